"""The value tables: NF4 and FP4 (16 values), the dynamic 8-bit map (256), and how each is derived.

A codebook is data. A plugin adds one through the hook `fourbit_register_codebooks`; every backend takes
the table as an argument, so a new 4-bit data type needs no new kernel.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

NF4_VALUES: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NormalFloat4, index = code: QLoRA (arXiv 2305.14314), section 3 and appendix E."""

FP4_VALUES: tuple[float, ...] = (
    *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
    *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
    *(-0.0, -0.0052083334885537624, -0.6666666865348816, -1.0),
    *(-0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
)
"""FP4 as bitsandbytes defines it: sign, two exponent bits, one mantissa bit, divided by the maximum 12."""

QLORA_OFFSET = 0.9677083
"""Outermost probability of QLoRA's NF4: the mean of 1 - 1/(2·15) and 1 - 1/(2·16)."""


@dataclass(frozen=True)
class Codebook:
    """A 4-bit data type.

    Attributes:
        name: the `quant_type` under which it is used and stored.
        values: 16 floats in [-1, 1]; the index is the code. Where a value occurs twice, quantization
            uses the lower code.
        signed_scale: if true a block's scale is its element of largest magnitude *with its sign* (the
            positive one where both signs reach it), so that a table with only one of -1 and +1 loses
            nothing. Dequantization is the same either way.
    """

    name: str
    values: tuple[float, ...]
    signed_scale: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", self.name):
            raise ValueError(f"codebook name {self.name!r}: want lower-case letters, digits and '_' (at most 32)")
        object.__setattr__(self, "values", tuple(float(v) for v in self.values))
        if len(self.values) != 16:
            raise ValueError(f"codebook {self.name!r}: want 16 values, got {len(self.values)}")
        if not all(abs(v) <= 1 for v in self.values):  # also false for NaN
            raise ValueError(f"codebook {self.name!r}: every value must be finite and within [-1, 1]")
        if max(abs(v) for v in self.values) != 1:
            raise ValueError(f"codebook {self.name!r}: the largest magnitude must be exactly 1 (a block's absmax)")
        if len(set(self.values)) < 2:
            raise ValueError(f"codebook {self.name!r}: want at least two different values")

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """The values as float32 [16] on `device`; cached, not to be written to."""
        return _table_on(self.values, torch.device(device))


NF4 = Codebook("nf4", NF4_VALUES)
FP4 = Codebook("fp4", FP4_VALUES)

ask_plugins: Callable[[], None] | None = None
"""Called before a name counts as unknown; `plugins`, which stands above this file, puts its loader here."""

_codebooks: dict[str, Codebook] = {"nf4": NF4, "fp4": FP4}
_tables: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def register(codebook: Codebook) -> None:
    """Add a data type. Raises TypeError for what is no Codebook, ValueError if the name is taken by other values."""
    if type(codebook) is not Codebook:
        raise TypeError(f"want a fourbit.codebooks.Codebook, got {type(codebook).__name__}")
    present = _codebooks.get(codebook.name)
    if present is not None and present != codebook:
        raise ValueError(f"codebook {codebook.name!r} is registered already, with other values")
    _codebooks[codebook.name] = codebook


def snapshot() -> dict[str, Codebook]:
    """The registered data types, for `restore`."""
    return dict(_codebooks)


def restore(saved: dict[str, Codebook]) -> None:
    """Forget what was registered since `snapshot`."""
    global _codebooks
    _codebooks = saved


def get(quant_type: str) -> Codebook:
    """The codebook of that name, asking installed plugins if it is not built in.

    Raises ValueError, naming the known types, if there is none.
    """
    if not isinstance(quant_type, str):
        raise TypeError(f"quant_type must be a string such as 'nf4', got {type(quant_type).__name__}")
    found = _codebooks.get(quant_type)
    if found is None and ask_plugins is not None:
        ask_plugins()
        found = _codebooks.get(quant_type)
    if found is None:
        raise ValueError(
            f"unknown quant_type {quant_type!r:.80}: known are {', '.join(sorted(_codebooks))}"
            " (a plugin adds one with the hook fourbit_register_codebooks)"
        )
    return found


def known() -> list[str]:
    """Names of the registered data types."""
    return sorted(_codebooks)


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The dynamic 8-bit map as float32 [256] on `device`, sorted; cached, not to be written to."""
    return _table_on(DYNAMIC_VALUES, torch.device(device))


def _table_on(values: tuple[float, ...], device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float32, device=device)  # a constant of the graph
    key = (values, device)
    table = _tables.get(key)
    if table is None:
        # outside any fake mode or device context: a cached tensor must be a real one
        with torch._C._DisableTorchDispatch(), torch.inference_mode(False):
            table = torch.tensor(values, dtype=torch.float32, device="cpu").to(device)
        _tables[key] = table
    return table


def thresholds(code: Tensor) -> tuple[Tensor, Tensor]:
    """How every backend chooses the nearest entry of `code` (float32 [16] or [256], any order).

    Returns `(edges, codes)`: the different values sorted ascending have the codes `codes` (uint8 [m], the
    lowest code where a value occurs twice), and `edges` (float32 [m-1]) are the midpoints
    `(v[i] + v[i+1]) * 0.5` of neighbours, computed in float32. A normalized element x takes the i-th value
    where `edges[i-1] < x <= edges[i]`: exactly at an edge the lower value wins, as in bitsandbytes.
    """
    values, order = torch.sort(code, stable=True)  # stable: +0 (code 0) before -0 (code 8) in FP4
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = values[1:] != values[:-1]
    values = values[first]
    return (values[:-1] + values[1:]) * 0.5, order[first].to(torch.uint8)


def derive_nf4_qlora(offset: float = QLORA_OFFSET) -> tuple[float, ...]:
    """NF4 as QLoRA derives it: this is the data type (equal to NF4_VALUES within float32 rounding).

    Nine quantiles of N(0, 1) at probabilities equally spaced from `offset` down to 1/2 give eight positive
    values (the ninth, at 1/2, is zero and is dropped), eight quantiles give seven negative ones, and an
    exact zero is put between; then all are divided by the largest magnitude. The two sides therefore have
    different spacings: 16 codes with both ends at ±1 *and* an exact zero cannot be symmetric.

    `derive_normal_midpoints` is the textbook alternative; its docstring says how they differ.
    """
    normal = NormalDist()
    positive = [normal.inv_cdf(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-normal.inv_cdf(offset + (0.5 - offset) * i / 7) for i in range(7)]
    top = max(positive)
    return tuple(v / top for v in sorted([*positive, 0.0, *negative]))


def derive_normal_midpoints(bits: int = 4) -> tuple[float, ...]:
    """The textbook quantile data type: 2^bits + 1 quantiles of N(0, 1), the mean of each neighbouring pair.

    The paper's own equation (4), q_i = (Q(i/(2^k+1)) + Q((i+1)/(2^k+1))) / 2, for i = 1 … 2^k - 1 and with
    the infinite outer quantiles replaced by ones as far out as QLoRA's offset; normalized to [-1, 1]. It is
    symmetric, so an even number of values leaves **no exact zero**: padding, pruned weights and zero biases
    would not survive, and the values differ from NF4 by up to about 0.08. No published checkpoint uses it,
    and fourbit provides it for study only.
    """
    count = 2**bits
    normal = NormalDist()
    lo, hi = 1 - QLORA_OFFSET, QLORA_OFFSET
    quantiles = [normal.inv_cdf(lo + (hi - lo) * i / count) for i in range(count + 1)]
    middles = [(a + b) / 2 for a, b in zip(quantiles, quantiles[1:], strict=False)]
    return tuple(v / middles[-1] for v in middles)


def derive_fp4() -> tuple[float, ...]:
    """FP4: code = sign·8 + e·2 + m over 12, with bitsandbytes' own order and a subnormal 1/192.

    The magnitudes are 0, 1/16, 8, 12, 4, 6, 2, 3 (codes 0-7), divided by 12; codes 8-15 are their negatives.
    """
    magnitudes = (0.0, 1 / 16, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    return tuple(sign * m / 12 for sign in (1.0, -1.0) for m in magnitudes)


def derive_dynamic_map() -> tuple[float, ...]:
    """The dynamic 8-bit data type (Dettmers, arXiv 2110.02861, section 2.1): 256 values, sorted.

    For i = 0 … 6: ±10^(i-6) times the midpoints of linspace(0.1, 1, 2^i + 1), which makes 254 values, plus
    0 and 1. The first is -0.99296875, zero is at index 127, and there is no -1.

    In plain Python with each float32 rounding written out, since a vectorized linspace rounds differently
    from one instruction set to the next. The bits are those that published checkpoints hold.
    """
    values = [0.0, 1.0]
    for i in range(7):
        count = 2**i
        low, step = _f32(0.1), _f32(_f32(1 - _f32(0.1)) / count)
        # torch.linspace: from both ends towards the middle, each multiply-add rounded once
        edges = [
            _f32(low + step * j) if j < (count + 1) // 2 else _f32(1 - step * (count - j)) for j in range(count + 1)
        ]
        power = _f32(10.0 ** (i - 6))
        for left, right in zip(edges, edges[1:], strict=False):
            value = _f32(power * _f32(_f32(left + right) / 2))
            values += [value, -value]
    return tuple(sorted(values))


def _f32(value: float) -> float:
    """`value` rounded to float32."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


DYNAMIC_VALUES: tuple[float, ...] = derive_dynamic_map()
