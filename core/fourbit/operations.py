"""One record an op: its schema, its check, its result on fake tensors, its derivative, and what it is composed of.

`ops`, `autograd` and `vmap` register torch.ops.fourbit.* from these records, and `backend` takes the names. An op is
a record here, a method of `Backend` and a module of `fourbit.testing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from fourbit import checks
from fourbit.scales import NESTED_BLOCKSIZE
from fourbit.weight import Weight

Key = tuple[torch.device, torch.dtype, int, bool]
"""Of the dispatch tables: device, dtype, blocksize, and whether the scales are nested."""

Call = tuple[Key, tuple[Any, ...]]
"""What a check returns: where to look for the method, and its arguments."""

_WEIGHT = "Weight weight"
_FLAT = ["Tensor packed", "Tensor absmax", "Tensor code", "int blocksize"]
_NESTED = ["Tensor? nested_absmax=None", "Tensor? nested_code=None", "Tensor? nested_offset=None"]
_FIELDS = ", ".join(Weight._fields)


@dataclass(frozen=True)
class Operation:
    """An op of `torch.ops.fourbit`.

    Attributes:
        name: of the op, and of the Backend method that runs it.
        arguments: as that method takes them, in the types of torch's schemas; "Weight weight" for a weight.
        returns: its type, likewise.
        check: called with the op's name and its arguments, raises TypeError or ValueError; returns the dispatch key
            and the arguments as the method may rely on them.
        fake: the arguments to a result of the right shape, dtype and device.
        composition: what runs where a backend leaves the op to the base class; None if it may not.
        needs: another op that this composition is made of.
        rows: how a batch of first arguments becomes one call (see `vmap`); None: it cannot.
        transposed: for the products, the op that is their gradient to x.
        autocast: whether x and bias are cast as torch's own linear casts them.
        method: whether it is a Backend method; if not, `ops` composes it of others.
    """

    name: str
    arguments: str
    returns: str
    check: Callable[..., Call]
    fake: Callable[..., Any]
    composition: str | None = None
    needs: str | None = None
    rows: str | None = None
    transposed: str | None = None
    autocast: bool = False
    method: bool = True
    flat: tuple[str, ...] = field(init=False)
    """The arguments of torch's schema, where a weight is four required ones and three at the start of the others."""
    unflatten: Callable[..., tuple[Any, ...]] = field(init=False)
    """The arguments of torch's schema, of which trailing ones may be left out, to those of the method."""

    def __post_init__(self) -> None:
        each = self.arguments.split(", ")
        required = [argument for argument in each if "=" not in argument]
        optional = each[len(required) :]
        if _WEIGHT in required:
            at = required.index(_WEIGHT)
            required[at : at + 1] = _FLAT
            optional = [*_NESTED, *optional]
        object.__setattr__(self, "flat", (*required, *optional))
        # written out as a function: taking the arguments apart by their places would cost half a microsecond a call
        flat = ", ".join(argument.split(" ", 1)[1] for argument in self.flat)
        names = [argument.split()[1].split("=")[0] for argument in each]
        method = ", ".join("new(Weight, (" + _FIELDS + "))" if name == "weight" else name for name in names)
        function = eval(f"lambda {flat}: ({method},)", {"new": tuple.__new__, "Weight": Weight})
        object.__setattr__(self, "unflatten", function)

    @property
    def schema(self) -> str:
        """The op in torch's schema language."""
        return f"{self.name}({', '.join(self.flat)}) -> {self.returns}"


# ---- checks: the dispatch key, and the arguments as a backend may rely on them --------------------------------


def _check_quantize(op: str, w: Tensor, code: Tensor, blocksize: int, signed_scale: bool = False) -> Call:
    checks.source(op, "w", w)
    checks.blocksize(op, blocksize)
    checks.code(op, code, 16, w.device)
    return (w.device, w.dtype, blocksize, False), (w.contiguous(), code.contiguous(), blocksize, signed_scale)


def _check_quantize_scaled(op: str, w: Tensor, code: Tensor, blocksize: int, scales: Tensor) -> Call:
    key, (w, code, *_) = _check_quantize(op, w, code, blocksize)
    checks.given_scales(op, scales, w, blocksize)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(f"{op}: scales must be finite")
    return key, (w, code, blocksize, scales.contiguous())


def _check_quantize_blockwise(op: str, x: Tensor, code: Tensor, blocksize: int) -> Call:
    checks.source(op, "x", x)
    checks.blocksize(op, blocksize)
    checks.code(op, code, 256, x.device)
    return (x.device, x.dtype, blocksize, False), (x.contiguous(), code.contiguous(), blocksize)


def _check_double_quantize(op: str, absmax: Tensor, code: Tensor) -> Call:
    checks.source(op, "absmax", absmax)
    checks.code(op, code, 256, absmax.device)
    return (absmax.device, torch.float32, NESTED_BLOCKSIZE, False), (absmax.float(), code.clone())


def _check_dequantize(op: str, weight: Weight, shape: Sequence[int], dtype: torch.dtype) -> Call:
    checks.compute_dtype(op, dtype)
    device = weight.packed.device
    weight = weight.checked(op, prod(shape), device)
    return (device, dtype, weight.blocksize, weight.nested), (weight, shape, dtype)


def _check_embedding(op: str, ids: Tensor, weight: Weight, rows: int, dim: int, dtype: torch.dtype) -> Call:
    checks.compute_dtype(op, dtype)
    checks.integers(op, "ids", ids)
    weight = weight.checked(op, rows * dim, ids.device)
    return (ids.device, dtype, weight.blocksize, weight.nested), (ids.contiguous(), weight, rows, dim, dtype)


def _check_dequantize_blockwise(
    op: str, codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
) -> Call:
    checks.compute_dtype(op, dtype)
    checks.blockwise(op, codes, absmax, code, blocksize)
    tensors = (codes.contiguous(), absmax.contiguous(), code.contiguous())
    return (codes.device, dtype, blocksize, False), (*tensors, blocksize, dtype)


def _check_linear(op: str, x: Tensor, weight: Weight, width: int, bias: Tensor | None = None) -> Call:
    checks.activations(op, "grad" if op.endswith("grad") else "x", x)
    weight = weight.checked(op, width * x.shape[-1], x.device)
    key = (x.device, x.dtype, weight.blocksize, weight.nested)
    if bias is None:
        return key, (x.contiguous(), weight, width)
    checks.bias(op, bias, width, x)
    return key, (x.contiguous(), weight, width, bias.contiguous())


def _check_grouped(op: str, x: Tensor, offsets: Tensor, weight: Weight, width: int) -> Call:
    checks.activations(op, "grad" if op.endswith("grad") else "x", x)
    checks.integers(op, "offsets", offsets)
    checks.group_offsets(op, offsets, x)
    weight = weight.checked(op, offsets.numel() * x.shape[-1] * width, x.device)
    key = (x.device, x.dtype, weight.blocksize, weight.nested)
    return key, (x.contiguous(), offsets.contiguous(), weight, width)


# ---- results of the right shape and dtype, also of symbolic sizes ---------------------------------------------


def _fake_scales(x: Tensor, blocksize: int) -> Tensor:
    return x.new_empty(((x.numel() + blocksize - 1) // blocksize,), dtype=torch.float32)


def _fake_quantize(w: Tensor, code: Tensor, blocksize: int, *_: object) -> tuple[Tensor, Tensor]:
    checks.source("quantize_4bit", "w", w)
    checks.blocksize("quantize_4bit", blocksize)
    return w.new_empty(((w.numel() + 1) // 2, 1), dtype=torch.uint8), _fake_scales(w, blocksize)


def _fake_double_quantize(absmax: Tensor, code: Tensor) -> tuple[Tensor, ...]:
    codes = absmax.new_empty((absmax.numel(),), dtype=torch.uint8)
    return codes, _fake_scales(absmax, NESTED_BLOCKSIZE), code.new_empty((256,)), code.new_empty(())


# ---- the records ----------------------------------------------------------------------------------------------

_BY_EXPERT = "dequantize_4bit and torch's matmul, expert by expert"
_PLAIN = "the reference's plain torch"
_quantizing = partial(Operation, returns="(Tensor, Tensor)")
_decoding = partial(Operation, returns="Tensor")
_composed = partial(Operation, returns="Tensor", needs="dequantize_4bit")
_linear = partial(
    _composed,
    check=_check_linear,
    fake=lambda x, weight, width, bias=None: x.new_empty((*x.shape[:-1], width)),
    rows="leading",
)
_grouped = partial(
    _composed,
    check=_check_grouped,
    fake=lambda x, offsets, weight, width: x.new_empty((x.shape[0], width)),
    rows="experts",
    composition=_BY_EXPERT,
)

_ALL = (
    _quantizing(
        "quantize_4bit",
        "Tensor w, Tensor code, int blocksize, bool signed_scale=False",
        check=_check_quantize,
        fake=_fake_quantize,
    ),
    _quantizing(
        "quantize_4bit_scaled",
        "Tensor w, Tensor code, int blocksize, Tensor scales",
        check=_check_quantize_scaled,
        fake=_fake_quantize,
        composition=_PLAIN,
    ),
    _decoding(
        "dequantize_4bit",
        "Weight weight, SymInt[] shape, ScalarType dtype",
        check=_check_dequantize,
        fake=lambda weight, shape, dtype: weight.packed.new_empty(tuple(shape), dtype=dtype),
    ),
    _linear(
        "linear_4bit",
        "Tensor x, Weight weight, SymInt out_features, Tensor? bias=None",
        composition="dequantize_4bit, then torch's linear",
        transposed="linear_4bit_grad",
        autocast=True,
    ),
    _linear(
        "linear_4bit_grad",
        "Tensor grad, Weight weight, SymInt in_features",
        composition="dequantize_4bit, then torch's matmul",
        transposed="linear_4bit",
    ),
    _composed(
        "embedding_4bit",
        "Tensor ids, Weight weight, SymInt num_embeddings, SymInt embedding_dim, ScalarType dtype",
        check=_check_embedding,
        fake=lambda ids, weight, rows, dim, dtype: ids.new_empty((*ids.shape, dim), dtype=dtype),
        composition="dequantize_4bit, then torch's embedding",
        rows="all",
    ),
    _grouped(
        "grouped_linear_4bit",
        "Tensor x, Tensor offsets, Weight weight, SymInt out_features",
        transposed="grouped_linear_4bit_grad",
        autocast=True,
    ),
    _grouped(
        "grouped_linear_4bit_grad",
        "Tensor grad, Tensor offsets, Weight weight, SymInt in_features",
        transposed="grouped_linear_4bit",
    ),
    _quantizing(
        "quantize_blockwise",
        "Tensor x, Tensor code, int blocksize",
        check=_check_quantize_blockwise,
        fake=lambda x, code, size: (x.new_empty(x.shape, dtype=torch.uint8), _fake_scales(x, size)),
        composition=_PLAIN,
    ),
    _decoding(
        "dequantize_blockwise",
        "Tensor codes, Tensor absmax, Tensor code, int blocksize, ScalarType dtype",
        check=_check_dequantize_blockwise,
        fake=lambda codes, absmax, code, blocksize, dtype: codes.new_empty(codes.shape, dtype=dtype),
        composition=_PLAIN,
    ),
    Operation(
        "double_quantize",
        "Tensor absmax, Tensor code",
        "(Tensor, Tensor, Tensor, Tensor)",
        check=_check_double_quantize,
        fake=_fake_double_quantize,
        method=False,
    ),
)
OPERATIONS: dict[str, Operation] = {each.name: each for each in _ALL}
"""Every op, by name."""
