"""The Backend base class: everything that a device has to provide, and nothing else.

A backend for new hardware subclasses `Backend`, implements `quantize_4bit` and `dequantize_4bit`, says in
`supports` what it can do, and is registered through the hook `fourbit_register_backends`. Every other op
has a default here, composed of those two; overriding one makes it faster. `pytest --pyargs fourbit.testing
--backend NAME` checks the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fourbit import numerics
from fourbit.operations import OPERATIONS
from fourbit.weight import Weight

API_VERSION = 2
"""Version of this contract. Raised when a signature or a meaning below changes."""

API_CHANGE = "since version 2 an op takes its weight as one fourbit.weight.Weight, and OpQuery.double_quant is `nested`"
"""What a backend that was written for the version before has to change."""

OPS: tuple[str, ...] = tuple(name for name, op in OPERATIONS.items() if op.method)
"""Names of the ops, each a method of Backend and (under torch.ops.fourbit) a torch op."""

COMPOSITIONS: dict[str, str] = {name: op.composition for name, op in OPERATIONS.items() if op.composition}
"""What runs where a backend does not override an op."""


@dataclass(frozen=True)
class OpQuery:
    """What `Backend.supports` is asked: one op on one kind of input.

    Attributes:
        op: a name of OPS.
        device: the tensors' device, with its index.
        dtype: of the floating-point side: of w or x for the quantizing and linear ops, of the result for
            the dequantizing ones and the embedding.
        blocksize: elements that share a scale: a power of two from 32 to 4096.
        nested: whether the scales come as 8-bit codes with nested scales, to be decoded inside the op.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    blocksize: int
    nested: bool = False


@dataclass(frozen=True)
class Support:
    """The answer to an OpQuery: true or false, and if false, why. Shown by `fourbit.explain`."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok

    @classmethod
    def no(cls, reason: str) -> Support:
        """An answer of no; `reason` completes the sentence "not used, because …"."""
        return cls(False, reason)


SUPPORTED = Support(True)


class Backend:
    """How the ops run on one kind of device.

    What every op method may rely on: all tensors lie on one device and are contiguous, sizes and dtypes have
    been checked, and `supports` has said yes. `w` and `x` are float32, bfloat16 or float16. A 4-bit weight comes as
    one `Weight`, whose docstring says how elements, codes and scales are laid out.

    Results have the same bits on every backend for the quantizing and dequantizing ops and the embedding.
    """

    api_version: ClassVar[int] = API_VERSION
    """The contract that the class was written for: write the number, not the constant."""

    name: ClassVar[str]
    """Lower-case word; used by `use_backend`, FOURBIT_BACKENDS and in every message."""

    device_types: ClassVar[tuple[str, ...]]
    """Values of `torch.device.type` that it serves; ("*",) means any."""

    priority: ClassVar[int] = 50
    """Among backends for one device the highest is asked first; an int or a float, read when it is registered.

    The reference has 0, fourbit's own backends 5.
    """

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine (what is missing, what to install), or None if it can.

        Asked once, when backends are loaded.
        """
        return None

    def default_blocksize(self, device: torch.device) -> int:
        """The blocksize for `blocksize=None` on `device`: a power of two from 32 to 4096.

        Asked when the backend is registered, for each of its device types, and once for each device in use.
        """
        return 64

    def supports(self, query: OpQuery) -> Support:
        """Whether it can run such an op. Must not raise; that, and an answer that is no Support, counts as a no.

        The default answers yes. Called once for each kind of input (by threads that meet it at the same moment, once
        by each), never per call.
        """
        return SUPPORTED

    def describe(self, query: OpQuery, shape: Sequence[int]) -> str:
        """One line on how it would run `query` for a weight of `shape`, for `fourbit.explain`.

        The default names the method that runs: the backend's own, or the composition it inherits.
        """
        method = getattr(type(self), query.op)
        if method is getattr(Backend, query.op):
            return f"composed: {COMPOSITIONS[query.op]}"
        return "its own implementation"

    # ---- required ---------------------------------------------------------------------------------

    def quantize_4bit(self, w: Tensor, code: Tensor, blocksize: int, signed_scale: bool) -> tuple[Tensor, Tensor]:
        """Quantize `w` (any shape, n elements) to `(packed [ceil(n/2), 1], absmax [ceil(n/blocksize)])`.

        Per block of `blocksize` consecutive elements, the last may be short: absmax = max|w| (with the sign
        of that element if `signed_scale`, the positive one on a tie); each element times 1/absmax, both in
        float32, takes the nearest entry as `codebooks.thresholds` defines. Where |absmax| is below 2^-126 the
        quotient w/absmax takes the place of the product. An all-zero block has absmax 0 and the code of
        zero; so has a block with NaN or Inf, but with absmax NaN. An odd count is padded with the code of
        zero.
        """
        raise NotImplementedError(f"backend {self.name!r} does not implement quantize_4bit")

    def dequantize_4bit(self, weight: Weight, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The weight as a tensor of `shape` and `dtype`: code value times scale in float32, rounded once."""
        raise NotImplementedError(f"backend {self.name!r} does not implement dequantize_4bit")

    # ---- composed of the two above unless overridden -----------------------------------------------

    def linear_4bit(self, x: Tensor, weight: Weight, out_features: int, bias: Tensor | None = None) -> Tensor:
        """x [..., K] times the transposed weight [out_features, K], plus bias [out_features], in x's dtype."""
        return functional.linear(x, self.dequantize_4bit(weight, (out_features, x.shape[-1]), x.dtype), bias)

    def linear_4bit_grad(self, grad: Tensor, weight: Weight, in_features: int) -> Tensor:
        """Gradient of `linear_4bit` for x: grad [..., N] times the weight [N, in_features], in grad's dtype."""
        return grad @ self.dequantize_4bit(weight, (grad.shape[-1], in_features), grad.dtype)

    def embedding_4bit(
        self, ids: Tensor, weight: Weight, num_embeddings: int, embedding_dim: int, dtype: torch.dtype
    ) -> Tensor:
        """Rows `ids` (int32 or int64, any shape) of the weight [num_embeddings, embedding_dim].

        Result [*ids.shape, embedding_dim] in `dtype`, equal to those rows of `dequantize_4bit` bit for bit.
        An id out of range raises IndexError (or the device's assertion), never reads elsewhere.
        """
        return functional.embedding(ids, self.dequantize_4bit(weight, (num_embeddings, embedding_dim), dtype))

    def grouped_linear_4bit(self, x: Tensor, offsets: Tensor, weight: Weight, out_features: int) -> Tensor:
        """Expert weights [E, out_features, K] applied to the rows of x [T, K], sorted by expert.

        `offsets` (int32 or int64 [E]): expert e takes the rows from offsets[e-1] (0 for the first) to
        offsets[e]; rows from offsets[-1] on give zeros. Result [T, out_features] in x's dtype.
        """
        return self._by_expert(x, offsets, weight, out_features, transpose=True)

    def grouped_linear_4bit_grad(self, grad: Tensor, offsets: Tensor, weight: Weight, in_features: int) -> Tensor:
        """Gradient of `grouped_linear_4bit` for x: grad [T, N] to [T, in_features]."""
        return self._by_expert(grad, offsets, weight, in_features, transpose=False)

    def _by_expert(self, x: Tensor, offsets: Tensor, weight: Weight, width: int, *, transpose: bool) -> Tensor:
        """Each expert's rows of x times its weight (transposed or not), by the backend's own linear ops."""
        out = x.new_zeros(x.shape[0], width)
        n, k = (width, x.shape[-1]) if transpose else (x.shape[-1], width)
        start = 0
        for expert, end in enumerate(offsets.tolist()):
            if end > start:
                rows, part = x[start:end], weight.expert(expert, n * k)
                if part is None:  # blocks run from one expert into the next
                    row = torch.tensor([expert], device=x.device)
                    w = self.embedding_4bit(row, weight, offsets.numel(), n * k, x.dtype).view(n, k)
                    out[start:end] = rows @ (w.T if transpose else w)
                elif transpose:
                    out[start:end] = self.linear_4bit(rows, part, n)
                else:
                    out[start:end] = self.linear_4bit_grad(rows, part, k)
            start = max(start, end)
        return out

    def quantize_4bit_scaled(self, w: Tensor, code: Tensor, blocksize: int, scales: Tensor) -> tuple[Tensor, Tensor]:
        """`quantize_4bit` with finite scales (float32, one a block) in place of absmax: `(packed, scales)`.

        The same rule: w times 1/scale (below 2^-126 w/scale) takes the nearest entry, beyond the table its ends; a
        scale of zero gives the code of zero. The scales come back 1-D, with NaN for a block with NaN or Inf.
        """
        return numerics.quantize_4bit(w, code, blocksize, scales=scales)

    def quantize_blockwise(self, x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
        """Quantize x to 8 bits: `(codes, absmax)`, codes uint8 in x's shape, absmax float32 [ceil(n/blocksize)].

        As `quantize_4bit`, with a code of float32 [256] and one element a byte. Used for the scales.
        """
        return numerics.quantize_blockwise(x, code, blocksize)

    def dequantize_blockwise(
        self, codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
    ) -> Tensor:
        """`code[codes] * absmax` of each block in float32, rounded once to `dtype`; in the shape of `codes`."""
        return numerics.dequantize_blockwise(codes, absmax, code, blocksize, dtype)
