"""The abstract ops, as torch ops `torch.ops.fourbit.*`: schemas, argument checks, and dispatch.

Registered with `Library.define` and `impl` (never `custom_op`, which costs four times as much a call), so
that torch.compile, FakeTensor and export see each op whole. The eager kernels here check the arguments and
call the method that the dispatch table holds; hooks are never called. The table is read from the registry's
state at each call, since that state is replaced, never changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fourbit import checks, double_quant, fakes, registry
from fourbit.dispatch import miss

Optional = Tensor | None
_uint8, _float32 = torch.uint8, torch.float32

_library = torch.library.Library("fourbit", "DEF")  # type: ignore[no-untyped-call]
_NESTED = "Tensor? nested_absmax=None, Tensor? nested_code=None, Tensor? nested_offset=None"
_WEIGHT = "Tensor packed, Tensor absmax, Tensor code, int blocksize"

SCHEMAS = {
    "quantize_4bit": "(Tensor w, Tensor code, int blocksize, bool signed_scale=False) -> (Tensor, Tensor)",
    "dequantize_4bit": f"({_WEIGHT}, SymInt[] shape, ScalarType dtype, {_NESTED}) -> Tensor",
    "linear_4bit": f"(Tensor x, {_WEIGHT}, SymInt out_features, {_NESTED}, Tensor? bias=None) -> Tensor",
    "linear_4bit_grad": f"(Tensor grad, {_WEIGHT}, SymInt in_features, {_NESTED}) -> Tensor",
    "embedding_4bit": f"(Tensor ids, {_WEIGHT}, SymInt num_embeddings, SymInt embedding_dim, ScalarType dtype,"
    f" {_NESTED}) -> Tensor",
    "grouped_linear_4bit": f"(Tensor x, Tensor offsets, {_WEIGHT}, SymInt out_features, {_NESTED}) -> Tensor",
    "grouped_linear_4bit_grad": f"(Tensor grad, Tensor offsets, {_WEIGHT}, SymInt in_features, {_NESTED}) -> Tensor",
    "quantize_blockwise": "(Tensor x, Tensor code, int blocksize) -> (Tensor, Tensor)",
    "dequantize_blockwise": "(Tensor codes, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
    "double_quantize": "(Tensor absmax, Tensor code) -> (Tensor, Tensor, Tensor, Tensor)",
}
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


# ---- eager kernels: check, look up, run -----------------------------------------------------------------


def _quantize_4bit(w: Tensor, code: Tensor, blocksize: int, signed_scale: bool = False) -> tuple[Tensor, Tensor]:
    checks.source("quantize_4bit", "w", w)
    checks.blocksize("quantize_4bit", blocksize)
    checks.code("quantize_4bit", code, 16, w.device)
    key = (w.device, w.dtype, blocksize, False)
    run = registry.state.tables["quantize_4bit"].get(key) or miss("quantize_4bit", key)
    result: tuple[Tensor, Tensor] = run(w.contiguous(), code.contiguous(), blocksize, signed_scale)
    return result


def _dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested_absmax: Optional = None,
    nested_code: Optional = None,
    nested_offset: Optional = None,
) -> Tensor:
    checks.compute_dtype("dequantize_4bit", dtype)
    count = 1
    for size in shape:
        count *= size
    nested = (nested_absmax, nested_code, nested_offset)
    weight, nested = checks.weight("dequantize_4bit", packed, absmax, code, blocksize, count, nested, packed.device)
    key = (packed.device, dtype, blocksize, nested_absmax is not None)
    run = registry.state.tables["dequantize_4bit"].get(key) or miss("dequantize_4bit", key)
    result: Tensor = run(*weight, blocksize, shape, dtype, *nested)
    return result


def _linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    out_features: int,
    nested_absmax: Optional = None,
    nested_code: Optional = None,
    nested_offset: Optional = None,
    bias: Optional = None,
    one_device: bool = False,
) -> Tensor:
    # The hot path: a hit in the table vouches for dtype and blocksize, one expression for the rest. `one_device`:
    # the caller has seen already that all tensors are on x's device.
    device = x.device
    key = (device, x.dtype, blocksize, nested_absmax is not None)
    run = registry.state.tables["linear_4bit"].get(key)
    shape = x.shape
    count = out_features * shape[-1] if shape else 0
    if (
        run is None
        or count == 0
        or packed.numel() != (count + 1) >> 1
        or absmax.numel() != -(-count // blocksize)
        or packed.dtype is not _uint8
        or (not one_device and not (packed.device == absmax.device == code.device == device))
        or code.numel() != 16
        or code.dtype is not _float32
        or not packed.is_contiguous()
        or not absmax.is_contiguous()
        or not code.is_contiguous()
        or (bias is not None and not _bias_fits(bias, out_features, x))
        or (
            (absmax.dtype is not _float32 or nested_code is not None or nested_offset is not None)
            if nested_absmax is None
            else not _nested_fit(absmax, nested_absmax, nested_code, nested_offset, device)
        )
    ):
        nested = (nested_absmax, nested_code, nested_offset)
        checks.activations("linear_4bit", "x", x)
        weight, nested = checks.weight("linear_4bit", packed, absmax, code, blocksize, count, nested, device)
        (packed, absmax, code), (nested_absmax, nested_code, nested_offset) = weight, nested
        if bias is not None:
            checks.bias("linear_4bit", bias, out_features, x)
            bias = bias.contiguous()
        if run is None:
            run = miss("linear_4bit", key)
    if not x.is_contiguous():
        x = x.contiguous()
    result: Tensor = run(
        x, packed, absmax, code, blocksize, out_features, nested_absmax, nested_code, nested_offset, bias
    )
    return result


def _bias_fits(bias: Tensor, out_features: int, x: Tensor) -> bool:
    """Whether the bias is surely right, as it is."""
    return bias.shape == (out_features,) and bias.dtype is x.dtype and bias.device == x.device and bias.is_contiguous()


def _nested_fit(
    absmax: Tensor, nested_absmax: Tensor, nested_code: Optional, nested_offset: Optional, device: torch.device
) -> bool:
    """Whether double-quantized scales are surely right; where this says no, `checks.weight` finds out and says why."""
    return (
        nested_code is not None
        and nested_offset is not None
        and absmax.dtype is _uint8
        and nested_absmax.numel() == -(-absmax.numel() // double_quant.NESTED_BLOCKSIZE)
        and nested_code.numel() == 256
        and nested_offset.numel() == 1
        and nested_absmax.dtype is nested_code.dtype is nested_offset.dtype is _float32
        and nested_absmax.device == nested_code.device == nested_offset.device == device
        and nested_absmax.is_contiguous()
        and nested_code.is_contiguous()
    )


def _linear_4bit_grad(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    in_features: int,
    nested_absmax: Optional = None,
    nested_code: Optional = None,
    nested_offset: Optional = None,
) -> Tensor:
    op = "linear_4bit_grad"
    nested = (nested_absmax, nested_code, nested_offset)
    checks.activations(op, "grad", grad)
    weight, nested = checks.weight(
        op, packed, absmax, code, blocksize, in_features * grad.shape[-1], nested, grad.device
    )
    key = (grad.device, grad.dtype, blocksize, nested_absmax is not None)
    run = registry.state.tables[op].get(key) or miss(op, key)
    result: Tensor = run(grad.contiguous(), *weight, blocksize, in_features, *nested)
    return result


def _embedding_4bit(
    ids: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
    nested_absmax: Optional = None,
    nested_code: Optional = None,
    nested_offset: Optional = None,
) -> Tensor:
    op = "embedding_4bit"
    nested = (nested_absmax, nested_code, nested_offset)
    checks.compute_dtype(op, dtype)
    checks.integers(op, "ids", ids)
    count = num_embeddings * embedding_dim
    weight, nested = checks.weight(op, packed, absmax, code, blocksize, count, nested, ids.device)
    key = (ids.device, dtype, blocksize, nested_absmax is not None)
    run = registry.state.tables[op].get(key) or miss(op, key)
    result: Tensor = run(ids.contiguous(), *weight, blocksize, num_embeddings, embedding_dim, dtype, *nested)
    return result


def _grouped(
    op: str,
    x: Tensor,
    offsets: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    blocksize: int,
    width: int,
    nested: checks.Nested,
) -> Tensor:
    checks.activations(op, "grad" if op.endswith("grad") else "x", x)
    checks.integers(op, "offsets", offsets)
    checks.group_offsets(op, offsets, x)
    count = offsets.numel() * x.shape[-1] * width
    weight, nested = checks.weight(op, *weight, blocksize, count, nested, x.device)
    key = (x.device, x.dtype, blocksize, nested[0] is not None)
    run = registry.state.tables[op].get(key) or miss(op, key)
    result: Tensor = run(x.contiguous(), offsets.contiguous(), *weight, blocksize, width, *nested)
    return result


def _grouped_linear_4bit(
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    out_features: int,
    *nested: Optional,
) -> Tensor:
    weight = (packed, absmax, code)
    return _grouped("grouped_linear_4bit", x, offsets, weight, blocksize, out_features, _three(nested))


def _grouped_linear_4bit_grad(
    grad: Tensor,
    offsets: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    in_features: int,
    *nested: Optional,
) -> Tensor:
    op, weight = "grouped_linear_4bit_grad", (packed, absmax, code)
    return _grouped(op, grad, offsets, weight, blocksize, in_features, _three(nested))


def _three(nested: Sequence[Optional]) -> checks.Nested:
    """The nested tensors, filled up with the None that torch leaves out of a call."""
    a, b, c = (*nested, None, None, None)[:3]
    return a, b, c


def _quantize_blockwise(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    checks.source("quantize_blockwise", "x", x)
    checks.blocksize("quantize_blockwise", blocksize)
    checks.code("quantize_blockwise", code, 256, x.device)
    key = (x.device, x.dtype, blocksize, False)
    run = registry.state.tables["quantize_blockwise"].get(key) or miss("quantize_blockwise", key)
    result: tuple[Tensor, Tensor] = run(x.contiguous(), code.contiguous(), blocksize)
    return result


def _dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    op = "dequantize_blockwise"
    checks.compute_dtype(op, dtype)
    checks.blockwise(op, codes, absmax, code, blocksize)
    key = (codes.device, dtype, blocksize, False)
    run = registry.state.tables[op].get(key) or miss(op, key)
    result: Tensor = run(codes.contiguous(), absmax.contiguous(), code.contiguous(), blocksize, dtype)
    return result


def _double_quantize(absmax: Tensor, code: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.source("double_quantize", "absmax", absmax)
    checks.code("double_quantize", code, 256, absmax.device)
    return double_quant.encode_scales(absmax.float(), code.clone(), _quantize_blockwise)


_EAGER = {
    "quantize_4bit": _quantize_4bit,
    "dequantize_4bit": _dequantize_4bit,
    "linear_4bit": _linear_4bit,
    "linear_4bit_grad": _linear_4bit_grad,
    "embedding_4bit": _embedding_4bit,
    "grouped_linear_4bit": _grouped_linear_4bit,
    "grouped_linear_4bit_grad": _grouped_linear_4bit_grad,
    "quantize_blockwise": _quantize_blockwise,
    "dequantize_blockwise": _dequantize_blockwise,
    "double_quantize": _double_quantize,
}
for _name, _kernel in _EAGER.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
for _name, _fake in fakes.FAKES.items():
    torch.library.register_fake(f"fourbit::{_name}", fakes.on_one_device(_name, _fake), lib=_library)
