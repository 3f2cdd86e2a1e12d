"""Backends with one realistic fault each, and the test of the suite that has to find it."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit import codebooks
from fourbit.backend import Support
from fourbit.reference import ReferenceBackend
from fourbit.weight import Weight


class Unbroken(ReferenceBackend):
    """No fault: passes wherever the others are run."""

    name = "unbroken"
    priority = -100  # never used unless asked for


class SwappedNibbles(Unbroken):
    """Element 2i in the low nibble: consistent with itself, and with no file in the world."""

    def quantize_4bit(self, w, code, blocksize, signed_scale):
        packed, absmax = super().quantize_4bit(w, code, blocksize, signed_scale)
        return (packed << 4) | (packed >> 4), absmax

    def dequantize_4bit(self, weight, *args):
        swapped = (weight.packed << 4) | (weight.packed >> 4)
        return super().dequantize_4bit(weight._replace(packed=swapped), *args)


class LargestNotLargestMagnitude(Unbroken):
    """absmax = max(w) instead of max|w|."""

    def quantize_4bit(self, w, code, blocksize, signed_scale):
        packed, _ = super().quantize_4bit(w, code, blocksize, signed_scale)
        blocks = torch.nn.functional.pad(w.reshape(-1).float(), (0, -w.numel() % blocksize))
        return packed, blocks.view(-1, blocksize).amax(1)


class UpperValueAtTies(Unbroken):
    """x < edge where x <= edge is meant: only values exactly at a threshold differ."""

    def quantize_4bit(self, w, code, blocksize, signed_scale):
        values, order = torch.sort(code, stable=True)
        packed, absmax = super().quantize_4bit(w, code, blocksize, signed_scale)
        if len(values.unique()) != 16 or not bool((absmax > 0).all()):
            return packed, absmax
        scale = (1 / absmax).repeat_interleave(blocksize)[: w.numel()]
        edges = (values[:-1] + values[1:]) * 0.5
        codes = order[torch.bucketize(w.reshape(-1).float() * scale, edges, right=True)].to(torch.uint8)
        return repack(codes, packed), absmax


class ShortBlockCutInHalf(Unbroken):
    """The last, short block takes its scale from an even number of 16 elements only."""

    def quantize_4bit(self, w, code, blocksize, signed_scale):
        packed, absmax = super().quantize_4bit(w, code, blocksize, signed_scale)
        rest = w.numel() % blocksize
        if rest % 16 and rest > 16:
            absmax[-1] = w.reshape(-1)[-rest : -(rest % 16)].abs().max().float()
        return packed, absmax


class PlausibleNumberForNaN(Unbroken):
    """NaN and Inf are replaced before quantization, as a fast max instruction does."""

    def quantize_4bit(self, w, code, blocksize, signed_scale):
        return super().quantize_4bit(w.nan_to_num(0, 1, -1), code, blocksize, signed_scale)


class BlocksEndWithRows(Unbroken):
    """linear_4bit assumes that K is a multiple of the blocksize."""

    def linear_4bit(self, x, weight, out_features, bias=None):
        k, absmax = x.shape[-1], weight.scales()
        column = torch.arange(k) // weight.blocksize
        row = torch.arange(out_features)[:, None] * max(k // weight.blocksize, 1)
        ones = Weight(weight.packed, torch.ones_like(absmax), weight.code, weight.blocksize)
        w = super().dequantize_4bit(ones, (out_features, k), torch.float32)
        w = w * absmax[(row + column).clamp(max=absmax.numel() - 1)]
        return torch.nn.functional.linear(x, w.to(x.dtype), bias)


class RoundedTwice(Unbroken):
    """dequantize_4bit rounds the scale to the output dtype before it multiplies."""

    def dequantize_4bit(self, weight, shape, dtype):
        rounded = weight.scales().to(dtype).float()
        return super().dequantize_4bit(Weight(weight.packed, rounded, weight.code, weight.blocksize), shape, dtype)


class OffsetForgotten(Unbroken):
    """Double-quantized scales without the mean that was taken off."""

    def dequantize_4bit(self, weight, *args):
        if weight.nested:
            weight = weight._replace(nested_offset=torch.zeros_like(weight.nested_offset))
        return super().dequantize_4bit(weight, *args)


class FusedMultiplyAdd(Unbroken):
    """Nested scales in one rounding instead of two: the last bit of some scales."""

    def dequantize_4bit(self, weight, *args):
        packed, absmax, code, blocksize, *nested = weight
        if weight.nested:
            scale, table, offset = (tensor.double() for tensor in nested)
            each = scale.reshape(-1).repeat_interleave(256)[: absmax.numel()]
            absmax = (table[absmax.reshape(-1).int()] * each + offset).float()
        return super().dequantize_4bit(Weight(packed, absmax, code, blocksize), *args)


class BiasOnlyForOneRow(Unbroken):
    """The kernel for several rows has no bias."""

    def linear_4bit(self, x, *args):
        *args, bias = args if len(args) == 3 else (*args, None)
        return super().linear_4bit(x, *args, *([bias] if x.numel() == x.shape[-1] else []))


class GradientOfZeros(Unbroken):
    """A training step that runs and learns nothing."""

    def linear_4bit_grad(self, grad, weight, in_features):
        return grad.new_zeros(*grad.shape[:-1], in_features)


class GradientTransposed(Unbroken):
    """grad times the transposed weight, wherever the sizes let it."""

    def linear_4bit_grad(self, grad, weight, in_features):
        if grad.shape[-1] != in_features:
            return super().linear_4bit_grad(grad, weight, in_features)
        return super().linear_4bit(grad, weight, in_features)


class ManyRowsCutShort(Unbroken):
    """A launch for 600 rows of x at most: those after them are never computed."""

    def linear_4bit(self, x, *args):
        return zero_from(600, super().linear_4bit(x, *args))


class GradientOfManyRowsCutShort(Unbroken):
    """The same in the gradient."""

    def linear_4bit_grad(self, grad, *args):
        return zero_from(600, super().linear_4bit_grad(grad, *args))


class ManyRowsOfAnExpertCutShort(Unbroken):
    """The same for one expert's rows."""

    def grouped_linear_4bit(self, x, offsets, *args):
        out = super().grouped_linear_4bit(x, offsets, *args)
        for start, end in zip([0, *offsets.tolist()], offsets.tolist(), strict=False):
            zero_from(600, out[start:end])
        return out


class NegativeIdsWrap(Unbroken):
    """embedding_4bit counts negative ids from the end, as indexing does."""

    def embedding_4bit(self, ids, weight, num_embeddings, *rest):
        return super().embedding_4bit(ids.remainder(num_embeddings), weight, num_embeddings, *rest)


class BlocksizeIgnored(Unbroken):
    """Kernels written for 64, whatever is asked; each scale is repeated or dropped to fit."""

    def quantize_4bit(self, w, code, blocksize, signed_scale):
        packed, absmax = super().quantize_4bit(w, code, 64, signed_scale)
        blocks = -(-w.numel() // blocksize)
        return packed, absmax.repeat_interleave(max(64 // blocksize, 1))[:: max(blocksize // 64, 1)][:blocks].clone()


class NegativeZeroInFP4(Unbroken):
    """Tiny negative values take code 8 (-0): the same numbers, other bytes."""

    def quantize_4bit(self, w, code, blocksize, signed_scale):
        packed, absmax = super().quantize_4bit(w, code, blocksize, signed_scale)
        codes = unpack(packed, w.numel())
        if float(code[8]) == 0 and float(code[0]) == 0:
            codes = torch.where((codes == 0) & (w.reshape(-1) < 0), 8, codes).to(torch.uint8)
        return repack(codes, packed), absmax


class PaddedWithNibbleZero(Unbroken):
    """An odd count ends with nibble 0, which in NF4 is -1."""

    def quantize_4bit(self, w, code, blocksize, signed_scale):
        packed, absmax = super().quantize_4bit(w, code, blocksize, signed_scale)
        if w.numel() % 2:
            packed[-1] &= 0xF0
        return packed, absmax


class DivisionForReciprocal(Unbroken):
    """w / absmax instead of w times 1/absmax: another last bit, another side of a threshold."""

    def quantize_4bit(self, w, code, blocksize, signed_scale):
        packed, absmax = super().quantize_4bit(w, code, blocksize, signed_scale)
        if signed_scale or not bool((absmax > 2.0**-126).all()):
            return packed, absmax
        edges, order = codebooks.thresholds(code)
        normalized = w.reshape(-1).float() / absmax.repeat_interleave(blocksize)[: w.numel()]
        return repack(order[torch.bucketize(normalized, edges)], packed), absmax


class SubnormalsFlushed(Unbroken):
    """What a device does whose compiler was told to be fast."""

    def quantize_4bit(self, w, code, blocksize, signed_scale):
        w = w.float()
        return super().quantize_4bit(torch.where(w.abs() < 2.0**-126, 0, w), code, blocksize, signed_scale)


class OneCodebookBuiltIn(Unbroken):
    """The table that is passed is not looked at: NF4, or FP4 where the first value is zero."""

    def quantize_4bit(self, w, code, blocksize, signed_scale):
        table = codebooks.FP4 if float(code[0]) == 0 else codebooks.NF4
        return super().quantize_4bit(w, table.tensor(), blocksize, signed_scale)


class LowPrecisionProduct(Unbroken):
    """float32 operands multiplied in bfloat16."""

    def linear_4bit(self, x, *args):
        *args, bias = args if len(args) == 3 else (*args, None)
        out = super().linear_4bit(x.bfloat16(), *args).to(x.dtype)
        return out if bias is None else out + bias


class SumInNoOrder(Unbroken):
    """A reduction by atomic additions: right within the bounds, and different from call to call."""

    def linear_4bit(self, x, *args):
        out = super().linear_4bit(x, *args)
        return out * (1 + torch.finfo(x.dtype).eps * torch.randint_like(out, 0, 2))


class EmptyExpertsSkipped(Unbroken):
    """An expert without rows is not counted, so that those after it use the wrong weight."""

    def grouped_linear_4bit(self, x, offsets, *args):
        busy = offsets.diff(prepend=offsets.new_zeros(1)) > 0
        shifted = torch.cat([offsets[busy], offsets[~busy].fill_(int(offsets[-1]))])
        return super().grouped_linear_4bit(x, shifted, *args)


class TruncatedTo8Bits(Unbroken):
    """The next lower entry of the 8-bit map instead of the nearest."""

    def quantize_blockwise(self, x, code, blocksize):
        codes, absmax = super().quantize_blockwise(x, code, blocksize)
        above = code[codes.int()].reshape(-1) * absmax.repeat_interleave(blocksize)[: x.numel()] > x.reshape(-1)
        return (codes.int() - above.view(x.shape).int()).clamp(min=0).to(torch.uint8), absmax


class GivenScalesIgnored(Unbroken):
    """Scales that are given are stored, and absmax is divided by."""

    def quantize_4bit_scaled(self, w, code, blocksize, scales):
        return self.quantize_4bit(w, code, blocksize, False)[0], scales.reshape(-1)


class InputWrittenTo(Unbroken):
    """x is scaled in place on the way, and never restored."""

    def linear_4bit(self, x, *args):
        out = super().linear_4bit(x, *args)
        x.mul_(2)
        return out


class SupportsRaises(Unbroken):
    """Asked for a dtype that it does not know, it raises instead of saying no."""

    def supports(self, query):
        return {torch.float32: Support(True), torch.float16: Support(True)}[query.dtype]


class NoReason(Unbroken):
    """Declines without saying why."""

    def supports(self, query):
        return Support(query.dtype is not torch.float16)


class DeclinesEverything(Unbroken):
    """Every test would be a skip, and none a failure."""

    def supports(self, query):
        return Support.no("it is not ready yet")


def zero_from(first: int, out: Tensor) -> Tensor:
    """`out` with its rows from number `first` on set to zero."""
    out.view(-1, out.shape[-1])[first:] = 0
    return out


def unpack(packed: Tensor, count: int) -> Tensor:
    """The codes of `count` elements, one a byte."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).view(-1)[:count]


def repack(codes: Tensor, like: Tensor) -> Tensor:
    """Codes as packed bytes; an odd count keeps the last nibble of `like`."""
    if codes.numel() % 2:
        codes = torch.cat([codes, like.reshape(-1)[-1:] & 15])
    return ((codes[0::2] << 4) | codes[1::2]).view(-1, 1)


BREAKAGES: dict[type[Unbroken], str] = {
    SwappedNibbles: "test_quantize::test_known_bytes",
    LargestNotLargestMagnitude: "test_quantize::test_same_bits[negative constant",
    UpperValueAtTies: "test_quantize::test_beside_thresholds",
    ShortBlockCutInHalf: "test_quantize::test_short_last_block",
    PlausibleNumberForNaN: "test_quantize::test_non_finite",
    BlocksEndWithRows: "test_linear::test_shapes",
    RoundedTwice: "test_dequantize::test_same_bits",
    OffsetForgotten: "test_dequantize::test_every_blocksize[32-torch.float32-double",
    FusedMultiplyAdd: "test_dequantize::test_every_blocksize[32-torch.float32-double",
    BiasOnlyForOneRow: "test_linear::test_bias[2",
    GradientOfZeros: "test_autograd::test_first_gradients",
    GradientTransposed: "test_linear::test_grad_shapes[(64, 64)",
    ManyRowsCutShort: "test_linear::test_prefill[640",
    GradientOfManyRowsCutShort: "test_linear::test_prefill[640",
    ManyRowsOfAnExpertCutShort: "test_grouped::test_prefill[900 rows",
    NegativeIdsWrap: "test_embedding::test_ids_out_of_range[torch.int64--1",
    BlocksizeIgnored: "test_quantize::test_every_blocksize[128",
    NegativeZeroInFP4: "test_quantize::test_tiny_values_take_code_zero_in_fp4",
    PaddedWithNibbleZero: "test_quantize::test_ragged_shapes",
    DivisionForReciprocal: "test_quantize::test_beside_thresholds",
    SubnormalsFlushed: "test_quantize::test_same_bits[subnormal",
    OneCodebookBuiltIn: "test_quantize::test_same_bits[normal-unordered",
    LowPrecisionProduct: "test_linear::test_shapes[(64, 64)-torch.float32",
    SumInNoOrder: "test_determinism::test_products_of_some_size",
    EmptyExpertsSkipped: "test_grouped::test_offsets[empty experts",
    TruncatedTo8Bits: "test_blockwise::test_nearest",
    GivenScalesIgnored: "test_given_scales::test_nearest_by_brute_force[32",
    InputWrittenTo: "test_fake::test_opcheck[linear_4bit",
    SupportsRaises: "test_contract::test_supports_answers_everything",
    NoReason: "test_contract::test_supports_answers_everything",
    DeclinesEverything: "test_contract::test_supports_the_required_ops",
}
"""Fault to the beginning of a test that must fail, as module::test[parameters."""
