"""What the reference makes of an input, always on the CPU; comparison bit for bit; error bounds of products."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fourbit import reference, scales
from fourbit.codebooks import Codebook, dynamic_map
from fourbit.state import QuantState
from fourbit.testing.inputs import CODEBOOKS, normal
from fourbit.weight import Weight

REFERENCE = reference.backend
SAME_SIZE_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Sample:
    """A 4-bit weight that the reference quantized, on the CPU."""

    codebook: Codebook
    shape: tuple[int, ...]
    blocksize: int
    packed: Tensor
    absmax: Tensor
    nested: tuple[Tensor, Tensor, Tensor] | tuple[()]

    def args(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor, int]:
        """packed, absmax, code and blocksize, as the ops take them."""
        return self.packed.to(device), self.absmax.to(device), self.codebook.tensor(device), self.blocksize

    def nested_args(self, device: torch.device | str) -> tuple[Tensor, ...]:
        """The nested tensors, or nothing."""
        return tuple(tensor.to(device) for tensor in self.nested)

    def weight(self, device: torch.device | str = "cpu") -> Weight:
        """The record that Backend's methods take."""
        return Weight(*self.args(device), *self.nested_args(device))

    def state(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> QuantState:
        """The QuantState, as the public functions take it."""
        return QuantState(
            *(self.absmax.to(device), torch.Size(self.shape), self.codebook.tensor(device), self.blocksize),
            *(self.codebook.name, dtype, *self.nested_args(device)),
        )

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, dequantized by the reference."""
        return REFERENCE.dequantize_4bit(self.weight(), self.shape, dtype)


def make_weight(
    *shape: int,
    codebook: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    values: Tensor | None = None,
    seed: int = 1,
) -> Sample:
    """Quantize `values` (default: normal deviates) with the reference."""
    book = CODEBOOKS[codebook]
    w = normal(prod(shape), seed=seed) if values is None else values
    packed, absmax = REFERENCE.quantize_4bit(w, book.tensor(), blocksize, book.signed_scale)
    nested: tuple[Tensor, ...] = ()
    if double_quant:
        absmax, *rest = nested_scales(absmax)
        nested = tuple(rest)
    return Sample(book, tuple(shape), blocksize, packed, absmax, nested)


def nested_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Double-quantized scales: `(codes, nested_absmax, nested_code, nested_offset)`."""
    return scales.double_quantize(absmax, dynamic_map(), REFERENCE.quantize_blockwise)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Fail unless the tensors agree in shape, dtype and every bit; NaNs agree whatever their payload."""
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, want {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, want {expected.dtype}"
    actual, expected = actual.detach().cpu().contiguous(), expected.detach().contiguous()
    integer = SAME_SIZE_INT[expected.element_size()]
    different = actual.view(integer) != expected.view(integer)
    if expected.is_floating_point():
        different &= ~(actual.isnan() & expected.isnan())
    if bool(different.any()):
        index = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(different.sum())} of {different.numel()} elements differ; the first at {list(index)}:"
            f" {actual[index].item()!r}, want {expected[index].item()!r}"
        )


def product_bound(x: Tensor, w: Tensor, exact: Tensor, dtype: torch.dtype, roundings: int = 2) -> Tensor:
    """The error that a right product x @ w in `dtype` may have, elementwise; x, w and `exact` in float64.

    Three parts: `roundings` of the result to `dtype` (one, and one more for a bias added to it); the
    weights rounded to `dtype` before the product, which a backend may do or not (rounding errors are as
    good as random, so eight standard deviations, and never more than all in one direction); and float32
    accumulation in any order. Products in TF32 or bfloat16 for float32 operands exceed it.
    """
    unit = torch.finfo(dtype).eps / 2
    total = x.abs() @ w.abs()
    inner = x.shape[-1]
    bound = (8 + inner**0.5) * torch.finfo(torch.float32).eps * total
    if dtype != torch.float32:
        spread = (x.square() @ w.square()).sqrt()
        bound = bound + torch.minimum(unit * total, 8 * unit * spread) + torch.finfo(dtype).smallest_normal
    return bound + roundings * unit * (exact.abs() + bound) + torch.finfo(torch.float32).smallest_normal


def assert_product(actual: Tensor, x: Tensor, w: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> None:
    """Fail unless `actual` is x @ w (+ bias) within `product_bound`, has dtype `dtype` and the right shape."""
    x, w = x.detach().cpu().double(), w.double()
    exact = x @ w
    bound = product_bound(x, w, exact, dtype)
    if bias is not None:
        bias = bias.detach().cpu().double()
        bound = bound + torch.finfo(dtype).eps * bias.abs()
        exact = exact + bias
    assert actual.dtype == dtype, f"result is {actual.dtype}, want {dtype}"
    assert actual.shape == exact.shape, f"result has shape {list(actual.shape)}, want {list(exact.shape)}"
    error = (actual.detach().cpu().double() - exact).abs()
    worst = error / bound
    assert not error.numel() or bool((error <= bound).all()), (  # also false for NaN
        f"error up to {float(worst.nan_to_num(torch.inf).max()):.3g} times the bound of {dtype};"
        f" {int((~(error <= bound)).sum())} of {error.numel()} elements exceed it"
    )
