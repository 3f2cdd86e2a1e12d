"""The CPU backend: native SIMD kernels for each instruction set, on torch's own threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from fourbit.backend import Backend, OpQuery
from fourbit.hookspecs import hookimpl
from fourbit.weight import Weight
from fourbit_cpu import native

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`Dtype` of src/kernels.h."""

HUGE_BYTES = 4 << 20
"""Fresh outputs from this size on are asked for in 2 MB pages: their page faults cost more than the kernel."""


class CpuBackend(Backend):
    """4-bit ops on the CPU. FOURBIT_CPU_ISA forces an instruction set; threads are `torch.get_num_threads()`."""

    api_version = 2
    name = "cpu"
    device_types = ("cpu",)
    priority = 5  # one that a user installed beside it is meant to be used

    def __init__(self) -> None:
        self.isa = ""
        """The instruction set in use: avx512_bf16, avx512, avx2, neon or scalar; set by `unavailable`."""
        self._native: ModuleType

    def unavailable(self) -> str | None:
        module, text = native.load()
        if module is None:
            return text
        self._native, self.isa = module, text
        return None

    def describe(self, query: OpQuery, shape: Sequence[int]) -> str:
        """The instruction set, and how a linear op multiplies."""
        how = f"{self.isa} kernels, {torch.get_num_threads()} threads"
        if not query.op.startswith(("linear", "grouped_linear")):
            return how
        pairs = self.isa == "avx512_bf16" and query.dtype == torch.bfloat16
        arithmetic = "bfloat16 dot products, float32 sums" if pairs else "float32 arithmetic"
        if query.op.endswith("grad"):
            return f"{how}; {arithmetic}, the weight decoded into a scratch in the cache"
        few = 8 if pairs else 4
        scratch = "decoded into a scratch in the cache"
        if len(shape) >= 2 and shape[-1] % 64:
            return f"{how}; {arithmetic}, the weight {scratch} (its rows are not a multiple of 64)"
        return f"{how}; {arithmetic}, the weight streamed for up to {few} rows of x, else {scratch}"

    def quantize_4bit(self, w: Tensor, code: Tensor, blocksize: int, signed_scale: bool) -> tuple[Tensor, Tensor]:
        count = w.numel()
        packed = torch.empty(((count + 1) // 2, 1), dtype=torch.uint8)
        absmax = torch.empty(-(-count // blocksize), dtype=torch.float32)
        self._prepare(packed)
        self._native.quantize_4bit(
            *(w.data_ptr(), DTYPES[w.dtype], count, code.data_ptr(), blocksize, signed_scale),
            *(packed.data_ptr(), absmax.data_ptr()),
        )
        return packed, absmax

    def dequantize_4bit(
        self,
        weight: Weight,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> Tensor:
        out = torch.empty(shape, dtype=dtype)
        self._prepare(out)
        self._native.dequantize_4bit(
            *_addresses(weight),
            *(out.numel(), DTYPES[dtype], out.data_ptr()),
        )
        return out

    def linear_4bit(self, x: Tensor, weight: Weight, out_features: int, bias: Tensor | None = None) -> Tensor:
        shape = x.shape
        k = shape[-1]
        out = x.new_empty((*shape[:-1], out_features))
        # `_addresses` written out: this is the hot path
        packed, absmax, code, blocksize, nested_absmax, nested_code, nested_offset = weight
        self._native.linear_4bit(
            x.data_ptr(),
            DTYPES[x.dtype],
            x.numel() // k,
            out_features,
            k,
            packed.data_ptr(),
            absmax.data_ptr(),
            code.data_ptr(),
            blocksize,
            0 if nested_absmax is None else nested_absmax.data_ptr(),
            0 if nested_code is None else nested_code.data_ptr(),
            0 if nested_offset is None else nested_offset.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
        )
        return out

    def linear_4bit_grad(
        self,
        grad: Tensor,
        weight: Weight,
        in_features: int,
    ) -> Tensor:
        n = grad.shape[-1]
        out = grad.new_empty((*grad.shape[:-1], in_features))
        self._native.linear_4bit_grad(
            *(grad.data_ptr(), DTYPES[grad.dtype], grad.numel() // n, n, in_features),
            *_addresses(weight),
            out.data_ptr(),
        )
        return out

    def embedding_4bit(
        self,
        ids: Tensor,
        weight: Weight,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype,
    ) -> Tensor:
        out = torch.empty((*ids.shape, embedding_dim), dtype=dtype)
        self._prepare(out)
        bad = self._native.embedding_4bit(
            *(ids.data_ptr(), ids.element_size(), ids.numel(), num_embeddings, embedding_dim),
            *_addresses(weight),
            *(DTYPES[dtype], out.data_ptr()),
        )
        if bad >= 0:
            value = int(ids.reshape(-1)[bad])
            raise IndexError(f"embedding_4bit: id {value} (position {bad}) is out of range for {num_embeddings} rows")
        return out

    def grouped_linear_4bit(self, x: Tensor, offsets: Tensor, weight: Weight, out_features: int) -> Tensor:
        shape = (out_features, x.shape[1])
        return _grouped(self._native.grouped_linear_4bit, x, offsets, weight, shape, out_features)

    def grouped_linear_4bit_grad(self, grad: Tensor, offsets: Tensor, weight: Weight, in_features: int) -> Tensor:
        shape = (grad.shape[1], in_features)
        return _grouped(self._native.grouped_linear_4bit_grad, grad, offsets, weight, shape, in_features)

    def quantize_blockwise(self, x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
        codes = torch.empty(x.shape, dtype=torch.uint8)
        absmax = torch.empty(-(-x.numel() // blocksize), dtype=torch.float32)
        self._prepare(codes)
        self._native.quantize_blockwise(
            *(x.data_ptr(), DTYPES[x.dtype], x.numel(), code.data_ptr(), blocksize),
            *(codes.data_ptr(), absmax.data_ptr()),
        )
        return codes, absmax

    def dequantize_blockwise(
        self, codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
    ) -> Tensor:
        out = torch.empty(codes.shape, dtype=dtype)
        self._prepare(out)
        self._native.dequantize_blockwise(
            *(codes.data_ptr(), absmax.data_ptr(), codes.numel(), code.data_ptr(), blocksize),
            *(DTYPES[dtype], out.data_ptr()),
        )
        return out

    def _prepare(self, fresh: Tensor) -> None:
        """Large pages for a large output that nothing has been written to."""
        size = fresh.nbytes
        if size >= HUGE_BYTES:
            self._native.advise_huge_pages(fresh.data_ptr(), size)


def _grouped(
    run: Callable[..., None], x: Tensor, offsets: Tensor, weight: Weight, shape: tuple[int, int], width: int
) -> Tensor:
    """Each expert's rows of x times its weight of `shape`; the result's rows have `width` elements."""
    ends = offsets.long()
    out = x.new_empty((x.shape[0], width))
    run(
        *(x.data_ptr(), DTYPES[x.dtype], x.shape[0], ends.data_ptr(), ends.numel(), *shape),
        *_addresses(weight),
        out.data_ptr(),
    )
    return out


def _addresses(weight: Weight) -> tuple[int, ...]:
    """The fields of `Weight` in src/kernels.h."""
    packed, absmax, code, blocksize, nested_absmax, nested_code, nested_offset = weight
    if nested_absmax is None or nested_code is None or nested_offset is None:
        return packed.data_ptr(), absmax.data_ptr(), code.data_ptr(), blocksize, 0, 0, 0
    nested = (nested_absmax.data_ptr(), nested_code.data_ptr(), nested_offset.data_ptr())
    return packed.data_ptr(), absmax.data_ptr(), code.data_ptr(), blocksize, *nested


backend = CpuBackend()


@hookimpl
def fourbit_register_backends(register: object) -> None:
    """The built-in CPU backend."""
    assert callable(register)
    register(backend)
