"""Launches of the kernels that move elements: quantize, dequantize, embedding, and the 8-bit forms.

Tensors come as `Backend` promises: on the launcher's device, contiguous, at any address; results are new, so
they are aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

from fourbit.weight import Weight
from fourbit_gpu.launcher import Launcher
from fourbit_gpu.spec import KernelSpec

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""-DDTYPE: FB_F32, FB_BF16 and FB_F16 of shim.h."""


def nested_addresses(weight: Weight) -> tuple[int, int, int]:
    """Of nested_absmax, nested_code and nested_offset; zeros for plain scales."""
    absmax, code, offset = weight[4:]
    if absmax is None:
        return 0, 0, 0
    assert code is not None and offset is not None
    return absmax.data_ptr(), code.data_ptr(), offset.data_ptr()


@cache
def quantize_spec(dtype: torch.dtype, blocksize: int, signed_scale: bool) -> KernelSpec:
    """Kernel of `quantize`."""
    defines = {"DTYPE": DTYPE_CODES[dtype], "BLOCKSIZE": blocksize, "SIGNED": int(signed_scale)}
    return KernelSpec.of("quantize.cu", "quantize_4bit", defines)


@cache
def dequantize_spec(dtype: torch.dtype, nested: bool) -> KernelSpec:
    """Kernel of `dequantize`."""
    return KernelSpec.of("dequantize.cu", "dequantize_4bit", {"DTYPE": DTYPE_CODES[dtype], "NESTED": int(nested)})


@cache
def embedding_spec(dtype: torch.dtype, nested: bool, wide: bool) -> KernelSpec:
    """Kernel of `embedding`; `wide` for int64 ids."""
    defines = {"DTYPE": DTYPE_CODES[dtype], "NESTED": int(nested), "WIDE": int(wide)}
    return KernelSpec.of("embedding.cu", "embedding_4bit", defines)


@cache
def blockwise_spec(name: str, dtype: torch.dtype, blocksize: int) -> KernelSpec:
    """Kernel of `quantize_blockwise` or `dequantize_blockwise`."""
    return KernelSpec.of("blockwise.cu", name, {"DTYPE": DTYPE_CODES[dtype], "BLOCKSIZE": blocksize})


MOST_WAVES = 4
TILES_A_BLOCK = 8
"""Many blocks share the last tiles out evenly, but each sorts the codebook first: eight tiles pay for that."""


def _blocks(launcher: Launcher, spec: KernelSpec, threads: int, tiles: int) -> int:
    """As many blocks as the device holds at once, or up to four times as many if each has tiles enough."""
    at_once = resident(launcher, spec, threads)
    return min(tiles, max(at_once, min(tiles // TILES_A_BLOCK, at_once * MOST_WAVES)))


@cache
def resident(launcher: Launcher, spec: KernelSpec, threads: int) -> int:
    """Blocks of `threads` that the device holds at once."""
    return max(launcher.kernel(spec).blocks_per_sm(threads), 1) * launcher.props.sm_count


def _tile_threads(blocksize: int) -> int:
    """Threads of a block of quantize.cu and blockwise.cu, eight elements each."""
    return max(blocksize // 8, 256)


def quantize(launcher: Launcher, w: Tensor, code: Tensor, blocksize: int, signed_scale: bool) -> tuple[Tensor, Tensor]:
    """See `Backend.quantize_4bit`."""
    count = w.numel()
    packed = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-count // blocksize), dtype=torch.float32, device=w.device)
    spec = quantize_spec(w.dtype, blocksize, signed_scale)
    threads = _tile_threads(blocksize)
    source = w.data_ptr()
    args = (source, code.data_ptr(), packed.data_ptr(), absmax.data_ptr(), count, int(source % 16 == 0))
    blocks = _blocks(launcher, spec, threads, -(-count // (8 * threads)))
    launcher.launch(spec, (blocks, 1, 1), threads, 0, args)
    return packed, absmax


DEQUANTIZE_THREADS = 256
DEQUANTIZE_TILE = 8 * DEQUANTIZE_THREADS * 2
"""Elements of a block of dequantize.cu. Blocks that stay and take tile after tile were 5 % slower on an H100."""


def dequantize(
    launcher: Launcher,
    weight: Weight,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor | None = None,
    first_block: int = 0,
) -> Tensor:
    """See `Backend.dequantize_4bit`.

    `out`, if given, is contiguous and 16-byte aligned and is written to and returned; with `first_block` the
    part of the weight that starts with that block is decoded, `out.numel()` elements of it (a multiple of
    256 if the scales are double-quantized).
    """
    packed, absmax, code, blocksize, *_ = weight
    if out is None:
        out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    count = out.numel()
    if count == 0:
        return out
    source, scales = packed.data_ptr(), absmax.data_ptr()
    nested, *nested_tables = nested_addresses(weight)
    if first_block:
        if nested and first_block % 256:
            raise ValueError(f"first_block {first_block} is not the first of a group of 256 scales")
        source += first_block * blocksize // 2
        scales += first_block * absmax.element_size()
        nested += first_block // 256 * 4 if nested else 0
    spec = dequantize_spec(out.dtype, weight.nested)
    args = (source, scales, code.data_ptr(), out.data_ptr(), count, blocksize.bit_length() - 1)
    blocks = -(-count // DEQUANTIZE_TILE)
    launcher.launch(spec, (blocks, 1, 1), DEQUANTIZE_THREADS, 0, (*args, nested, *nested_tables, int(source % 4 == 0)))
    return out


def embedding(
    launcher: Launcher,
    ids: Tensor,
    weight: Weight,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `Backend.embedding_4bit`. An id out of range is a device-side assertion."""
    rows = ids.numel()
    out = torch.empty((*ids.shape, embedding_dim), dtype=dtype, device=ids.device)
    if rows == 0:
        return out
    chunks = -(-embedding_dim // 8)
    log_lanes = min((chunks - 1).bit_length(), 8)
    blocks = -(-rows // (256 >> log_lanes))
    packed, absmax, code, blocksize, *_ = weight
    source = packed.data_ptr()
    args = (
        *(ids.data_ptr(), source, absmax.data_ptr(), code.data_ptr(), out.data_ptr()),
        *(rows, embedding_dim, num_embeddings, blocksize.bit_length() - 1),
        *nested_addresses(weight),
        *(log_lanes, int(source % 4 == 0 and embedding_dim % 8 == 0)),
    )
    spec = embedding_spec(dtype, weight.nested, ids.dtype is torch.int64)
    launcher.launch(spec, (blocks, 1, 1), 256, 0, args)
    return out


def quantize_blockwise(launcher: Launcher, x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """See `Backend.quantize_blockwise`."""
    count = x.numel()
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-count // blocksize), dtype=torch.float32, device=x.device)
    spec = blockwise_spec("quantize_blockwise", x.dtype, blocksize)
    threads = _tile_threads(blocksize)
    source = x.data_ptr()
    args = (source, code.data_ptr(), codes.data_ptr(), absmax.data_ptr(), count, int(source % 16 == 0))
    blocks = _blocks(launcher, spec, threads, -(-count // (8 * threads)))
    launcher.launch(spec, (blocks, 1, 1), threads, 0, args)
    return codes, absmax


def dequantize_blockwise(
    launcher: Launcher, codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    """See `Backend.dequantize_blockwise`."""
    count = prod(codes.shape)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if count == 0:
        return out
    spec = blockwise_spec("dequantize_blockwise", dtype, blocksize)
    threads = _tile_threads(blocksize)
    source = codes.data_ptr()
    args = (source, absmax.data_ptr(), code.data_ptr(), out.data_ptr(), count, int(source % 8 == 0))
    blocks = _blocks(launcher, spec, threads, -(-count // (8 * threads)))
    launcher.launch(spec, (blocks, 1, 1), threads, 0, args)
    return out
