"""Launches of the 4-bit products: on matrix cores, on vector units, or decoded pieces and torch's matmul."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fourbit.backend import OpQuery
from fourbit.weight import Weight
from fourbit_gpu import elementwise, pieces
from fourbit_gpu.elementwise import DTYPE_CODES
from fourbit_gpu.launcher import Launcher
from fourbit_gpu.spec import KernelSpec
from fourbit_rocm.targets import TARGETS

FUSED_ROWS = 16
"""Rows of x up to which the weight is decoded inside the product."""

THREADS = 256
VECTOR_ROWS = 4
"""Outputs that a wave of linear_vector.cu computes at a time; with many rows of x, registers allow only two."""


@cache
def vector_spec(dtype: torch.dtype, nested: bool, m: int) -> KernelSpec:
    """linear_vector.cu for m rows of x: one for each power of two, so that few are compiled."""
    most = 1 << (m - 1).bit_length()
    rows = VECTOR_ROWS if most <= 4 else VECTOR_ROWS // 2
    defines = {"DTYPE": DTYPE_CODES[dtype], "NESTED": int(nested), "M": most, "ROWS": rows, "COPIES": 16}
    return KernelSpec.of("linear_vector.cu", "linear_vector", defines, package="fourbit_rocm")


@cache
def mfma_spec(dtype: torch.dtype, nested: bool) -> KernelSpec:
    """linear_mfma.cu."""
    defines = {"DTYPE": DTYPE_CODES[dtype], "NESTED": int(nested)}
    return KernelSpec.of("linear_mfma.cu", "linear_mfma", defines, package="fourbit_rocm")


def path(arch: int, dtype: torch.dtype, m: int, k: int, blocksize: int) -> str:
    """ "mfma", "vector" or "pieces" for m rows of x with k features; addresses have their say in `linear`."""
    if not 0 < m <= FUSED_ROWS or k % 8:
        return "pieces"
    where = next((each for each in TARGETS.values() if each.number == arch), None)
    if where is None or dtype == torch.float32 or k % 64 or blocksize < 64:
        return "vector"
    exact = where.mfma_is_exact_in_half if dtype == torch.float16 else where.has_mfma
    return "mfma" if exact else "vector"


def linear(launcher: Launcher, x: Tensor, weight: Weight, out_features: int, bias: Tensor | None) -> Tensor:
    """See `Backend.linear_4bit`."""
    k = x.shape[-1]
    m = x.numel() // k if k else 0
    if m == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    chosen = path(launcher.props.arch, x.dtype, m, k, weight.blocksize)
    packed = weight.packed.data_ptr()
    if x.data_ptr() % 16 or packed % (16 if chosen == "mfma" else 4):
        chosen = "pieces"
    if chosen == "pieces":
        return pieces.linear(launcher, x, weight, out_features, bias)
    out = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    args = (
        *(x.data_ptr(), packed, weight.absmax.data_ptr(), weight.code.data_ptr()),
        *elementwise.nested_addresses(weight),
        *(0 if bias is None else bias.data_ptr(), out.data_ptr()),
    )
    shift = weight.blocksize.bit_length() - 1
    if chosen == "mfma":
        spec, tiles, sizes = mfma_spec(x.dtype, weight.nested), -(-out_features // 16), (m, out_features, k, shift)
    else:
        spec = vector_spec(x.dtype, weight.nested, m)
        rows = dict(spec.defines)["ROWS"]
        tiles = -(-out_features // (int(rows) * (THREADS // launcher.props.warp_size)))
        sizes = (m, out_features, k, shift)
    # each workgroup fills its table first, so no more of them than fit at once: they take tile after tile
    blocks = min(tiles, elementwise.resident(launcher, spec, THREADS))
    launcher.launch(spec, (blocks, 1, 1), THREADS, 0, (*args, *sizes))
    return out


def describe(query: OpQuery, shape: Sequence[int], arch: str) -> str:
    """One line on how a product runs for a weight of `shape`, for `fourbit.explain`."""
    if query.op == "linear_4bit_grad":
        return "columns of the weight decoded piece by piece, torch's matmul on each"
    k = shape[-1] if len(shape) else 0
    chosen = path(TARGETS[arch].number, query.dtype, 1, k, query.blocksize)
    ways = {"mfma": "matrix cores", "vector": "vector units", "pieces": "decoded pieces and torch's matmul"}
    if chosen == "pieces":
        return ways[chosen]
    return f"up to {FUSED_ROWS} rows of x on the {ways[chosen]}, beyond by {ways['pieces']}"
