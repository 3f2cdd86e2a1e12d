"""The public functions: quantize and dequantize, and the products with a packed weight and its QuantState."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fourbit import autograd as _autograd  # noqa: F401  (registers the derivatives)
from fourbit import checks, codebooks, dispatch
from fourbit import vmap as _vmap  # noqa: F401  (registers the rules)
from fourbit.scales import DOUBLE, FLOAT32, NESTED_BLOCKSIZE
from fourbit.state import QuantState

_quantize: Callable[..., tuple[Tensor, Tensor]] = torch.ops.fourbit.quantize_4bit.default
_dequantize: Callable[..., Tensor] = torch.ops.fourbit.dequantize_4bit.default
_quantize_scaled: Callable[..., tuple[Tensor, Tensor]] = torch.ops.fourbit.quantize_4bit_scaled.default
_linear: Callable[..., Tensor] = torch.ops.fourbit.linear_4bit.default
_embedding: Callable[..., Tensor] = torch.ops.fourbit.embedding_4bit.default
_grouped: Callable[..., Tensor] = torch.ops.fourbit.grouped_linear_4bit.default
_quantize_blockwise: Callable[..., tuple[Tensor, Tensor]] = torch.ops.fourbit.quantize_blockwise.default
_dequantize_blockwise: Callable[..., Tensor] = torch.ops.fourbit.dequantize_blockwise.default


class NonFiniteError(ValueError):
    """A weight has NaN or Inf; the message has its name and the first offending index."""


def quantize_4bit(
    w: Tensor,
    *,
    quant_type: str = "nf4",
    blocksize: int | None = None,
    double_quant: bool = False,
    scales: Tensor | None = None,
) -> tuple[Tensor, QuantState]:
    """Quantize a tensor to 4 bits, blockwise by absolute maximum (QLoRA, arXiv 2305.14314).

    Args:
        w: float32, bfloat16 or float16, any shape with at least one element; on any device.
        quant_type: "nf4", "fp4", or a type that a plugin registered.
        blocksize: consecutive elements that share a scale, a power of two from 32 to 4096; None takes the
            default of the backend that serves w's device.
        double_quant: store the scales in 8 bits too: 4.127 bits an element instead of 4.5 at blocksize 64.
        scales: finite scales, float32, one a block, on w's device, to use in place of each block's absolute maximum
            (a calibration's, say); None takes the maxima. A scale of zero gives zeros. With `double_quant` they are
            encoded first, and codes are chosen against the decoded scales, those that dequantization will use.

    Returns:
        `(packed, state)`: uint8 [ceil(n/2), 1], and the QuantState needed to read it.

    A block with NaN or Inf dequantizes to NaN, and no other block is harmed.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    _want_tensor("quantize_4bit", "w", w)
    checks.source("quantize_4bit", "w", w)
    codebook = codebooks.get(quant_type)
    if blocksize is None:
        blocksize = dispatch.default_blocksize(w.device)
    checks.blocksize("quantize_4bit", blocksize)
    code = codebook.tensor(w.device)
    scale_format = DOUBLE if double_quant else FLOAT32
    if scales is None:
        packed, absmax = _quantize(w.detach(), code, blocksize, codebook.signed_scale)
    else:
        _want_tensor("quantize_4bit", "scales", scales)
        checks.given_scales("quantize_4bit", scales, w, blocksize)
        scales = scales.detach().reshape(-1)
        packed, marked = _quantize_scaled(w.detach(), code, blocksize, _used(*scale_format.encode(scales)))
        absmax = torch.where(marked.isnan(), marked, scales)  # NaN: a block with NaN or Inf
    absmax, *nested = scale_format.encode(absmax)
    return packed, QuantState(absmax, torch.Size(w.shape), code, blocksize, codebook.name, w.dtype, *nested)


def _used(codes: Tensor, nested_absmax: Tensor | None, table: Tensor | None, offset: Tensor | None) -> Tensor:
    """`scales.decode`, by an op that torch.compile sees whole."""
    if nested_absmax is None or table is None or offset is None:
        return codes
    return _dequantize_blockwise(codes, nested_absmax, table, NESTED_BLOCKSIZE, torch.float32) + offset


def dequantize_4bit(packed: Tensor, state: QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """The weight as a tensor of `state.shape`, in `dtype` (None: the dtype that was quantized).

    Code value times scale in float32, rounded once. Raises TypeError or ValueError if packed and state do
    not fit each other.
    """
    _want_state("dequantize_4bit", packed, state)
    weight = (packed, state.absmax, state.code, state.blocksize)  # written out: a Weight would cost 0.3 µs
    nested = (state.nested_absmax, state.nested_code, state.nested_offset)
    return _dequantize(*weight, state.shape, state.dtype if dtype is None else dtype, *nested)


def linear_4bit(x: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times the transposed 4-bit weight [out, in], plus bias [out]; in x's dtype.

    Differentiable in x and bias; the weight is frozen, and only its packed form is kept for backward.
    Raises TypeError or ValueError, naming the argument that does not fit.
    """
    try:
        n, k = state.shape
    except ValueError:
        shape = list(state.shape)
        raise ValueError(f"linear_4bit: the weight must be 2-D [out, in], this one has shape {shape}") from None
    x_shape = x.shape
    if not x_shape or x_shape[-1] != k:  # comparing slices would cost 0.2 µs more
        raise ValueError(f"linear_4bit: x has shape {list(x.shape)}, the weight [out, in] = {[n, k]}")
    if bias is None and state.nested_absmax is None:  # fewer arguments, half a microsecond less
        return _linear(x, packed, state.absmax, state.code, state.blocksize, n)
    weight = state.weight(packed)
    return _linear(x, *weight[:4], n, *weight[4:], bias)


def embedding_4bit(ids: Tensor, packed: Tensor, state: QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """Rows `ids` (int32 or int64, any shape) of a 4-bit weight [rows, dim]: [*ids.shape, dim].

    `dtype` None means the dtype that was quantized. Raises IndexError for an id out of range.
    """
    _want_tensor("embedding_4bit", "ids", ids)
    _want_state("embedding_4bit", packed, state)
    if len(state.shape) != 2:
        raise ValueError(f"embedding_4bit: the weight must be 2-D [rows, dim], this one has {list(state.shape)}")
    weight = (packed, state.absmax, state.code, state.blocksize)
    nested = (state.nested_absmax, state.nested_code, state.nested_offset)
    return _embedding(ids, *weight, *state.shape, state.dtype if dtype is None else dtype, *nested)


def grouped_linear_4bit(x: Tensor, offsets: Tensor, packed: Tensor, state: QuantState) -> Tensor:
    """Stacked expert weights [E, out, in] applied to rows of x [T, in] that are sorted by expert.

    `offsets` (int32 or int64 [E]) are the ends of the experts' row ranges, as torch's grouped matmul takes
    them. Returns [T, out] in x's dtype, zeros for rows after the last offset. Differentiable in x.
    """
    _want_tensor("grouped_linear_4bit", "x", x)
    shape = state.shape
    if len(shape) != 3 or x.shape[-1:] != shape[2:] or offsets.shape != shape[:1]:
        raise ValueError(
            f"grouped_linear_4bit: x {list(x.shape)} and offsets {list(offsets.shape)} do not fit"
            f" the weight [experts, out, in] = {list(shape)}"
        )
    weight, nested = state.weight(packed).flat()
    return _grouped(x, offsets, *weight, shape[1], *nested)


def quantize_blockwise(x: Tensor, *, code: Tensor | None = None, blocksize: int = 256) -> tuple[Tensor, Tensor]:
    """Quantize to 8 bits: `(codes, absmax)`, uint8 in x's shape and float32 [ceil(n/blocksize)].

    `code` is a float32 [256] table, None the dynamic map (arXiv 2110.02861). Nearest entry, truly.
    """
    _want_tensor("quantize_blockwise", "x", x)
    return _quantize_blockwise(x.detach(), codebooks.dynamic_map(x.device) if code is None else code, blocksize)


def dequantize_blockwise(
    codes: Tensor,
    absmax: Tensor,
    *,
    code: Tensor | None = None,
    blocksize: int = 256,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Undo `quantize_blockwise`: table entry times absmax in float32, rounded once to `dtype`."""
    _want_tensor("dequantize_blockwise", "codes", codes)
    table = codebooks.dynamic_map(codes.device) if code is None else code
    return _dequantize_blockwise(codes, absmax, table, blocksize, dtype)


def require_finite(w: Tensor, name: str) -> None:
    """Raise NonFiniteError, with `name` and the first offending index, if w has NaN or Inf."""
    step = 1 << 22
    flat = w.detach().reshape(-1)
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        if not bool(torch.isfinite(torch.stack(torch.aminmax(part))).all()):  # NaN comes through; a tenth of the time
            first = start + int((~torch.isfinite(part)).nonzero()[0, 0])
            index = _unravel(first, w.shape)
            raise NonFiniteError(
                f"{name} has a non-finite value ({float(flat[first])}) at index {index}; it cannot be quantized"
            )


def _unravel(index: int, shape: Sequence[int]) -> list[int]:
    result: list[int] = []
    for size in reversed(shape):
        result.insert(0, index % size)
        index //= size
    return result


def _want_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def _want_state(op: str, packed: object, state: object) -> None:
    _want_tensor(op, "packed", packed)
    if not isinstance(state, QuantState):
        raise TypeError(f"{op}: state must be a fourbit.QuantState, got {type(state).__name__}")
