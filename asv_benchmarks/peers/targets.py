"""What backends are to reach, as ratios within one run, and whether a measurement reaches it."""

from __future__ import annotations

from dataclasses import dataclass

READ = "read bandwidth"
TORCH16 = "torch bf16"
TORCH32 = "torch fp32"
BNB = "bitsandbytes"
COMPOSED = "dequantize + torch"
RATE = "GB/s a thread"
MICROSECONDS = "µs a call"

TIME = "time over torch bf16's"

_AT_MOST = frozenset({MICROSECONDS, TIME, "disturbed"})
"""Measures of which less is better."""


@dataclass(frozen=True)
class Target:
    """`least` must be reached and `aim` is wished for, of `measure`: a fraction, a ratio to a peer, a rate or µs."""

    measure: str
    least: float
    aim: float | None = None

    def verdict(self, value: float) -> str:
        """ "aim met", "met" or "MISSED"."""
        if self.measure in _AT_MOST:
            value, least, aim = -value, -self.least, None if self.aim is None else -self.aim
        else:
            least, aim = self.least, self.aim
        if aim is not None and value >= aim:
            return "aim met"
        return "met" if value >= least else "MISSED"

    def describe(self) -> str:
        """Both bounds, as in "≥ 6.5, aim 8"."""
        sign = "≤" if self.measure in _AT_MOST else "≥"
        if self.measure == READ:
            text = f"{sign} {self.least:.0%}"
            return text if self.aim is None else f"{text}, aim {self.aim:.0%}"
        text = f"{sign} {self.least:g}"
        return text if self.aim is None else f"{text}, aim {self.aim:g}"


LINEAR: dict[tuple[str, int], tuple[Target, ...]] = {
    ("bf16", 1): (Target(READ, 0.80, 0.90), Target(TORCH16, 6.5, 8), Target(BNB, 1.6, 2)),
    ("fp32", 1): (Target(READ, 0.70, 0.80), Target(TORCH32, 8)),
    ("bf16", 4): (Target(TORCH16, 3.5, 4.5), Target(BNB, 1.35)),
    ("bf16", 16): (Target(TORCH16, 1.45, 1.9), Target(BNB, 1.1, 1.45)),
    ("bf16", 128): (Target(TORCH16, 0.95, 1.05), Target(BNB, 1.25)),
    ("fp32", 128): (Target(TORCH32, 2.2),),
    ("bf16", 512): (Target(TORCH16, 0.97, 1.05), Target(BNB, 1.3)),
    ("fp32", 512): (Target(TORCH32, 1.9),),
}
"""By dtype of the activations and rows, for 1 and 2 threads of a CPU with AVX512-BF16."""

LINEAR_AVX2: dict[tuple[str, int], tuple[Target, ...]] = {("bf16", 1): (Target(TORCH16, 2.5),)}
"""With every contender that can be restricted held to AVX2."""

QUANTIZE = (Target(RATE, 18), Target(BNB, 150))
DEQUANTIZE = (Target(BNB, 6, 8),)
MODULE = (Target(MICROSECONDS, 8, 6),)
NEVER_SLOWER = Target(COMPOSED, 1.0)
DISTURBED = Target("disturbed", 2.5)
DECODE = Target(TORCH16, 2.0)

MANY_ROWS = {64: (1.75, 2.2), 128: (1.5, 1.8), 256: (1.2, 1.3), 512: (1.02, 1.05), 1024: (1.0, None), 2048: (0.93, 1.0)}
"""On an H100 beside torch's 16-bit product, least and aim, by rows, for `LARGE`; between two, the later one's."""

LARGE = ((8192, 8192), (14336, 4096), (4096, 14336), (28672, 8192))
"""(out, in)."""

EXPERTS = {64: 2.0, 512: 1.0, 4096: 0.93}
"""On an H100 beside torch's grouped product, by tokens of 8 experts each; between two, the later one's."""

TRAINING = Target(TIME, 1.03)
PREFILL = Target(TIME, 1.02)
DECODE_GPU = {1: Target(TIME, 0.60), 8: Target(TIME, 0.66), 16: Target(TIME, 0.72)}
"""A step of an 8B Llama in a CUDA graph, by batch."""
GENERATE = Target(TIME, 0.65)


def many_rows(shape: tuple[int, int], rows: int, grad: bool) -> Target | None:
    """Of linear_4bit or its gradient on an H100, plain or double-quantized; None where there is none."""
    if grad:
        return Target(TORCH16, 0.93) if rows >= 512 else None
    if shape == (8192, 8192) and rows in (1, 16):
        return Target(TORCH16, 2.9 if rows == 1 else 2.6)
    if shape not in LARGE:
        return Target(TORCH16, 0.9)
    if rows < 64:
        return None
    return Target(TORCH16, *MANY_ROWS[next((m for m in MANY_ROWS if m >= rows), max(MANY_ROWS))])


def experts(tokens: int) -> Target:
    """Of grouped_linear_4bit and its gradient on an H100."""
    return Target(TORCH16, EXPERTS[next((t for t in EXPERTS if t >= tokens), max(EXPERTS))])


def linear(dtype: str, rows: int, isa: str | None = None) -> tuple[Target, ...]:
    """Targets of linear_4bit: `dtype` "bf16", "fp32" or "fp16"; `isa` None for the machine's best."""
    if isa is None:
        return LINEAR.get((dtype, rows), ())
    return LINEAR_AVX2.get((dtype, rows), ()) if isa == "avx2" else ()
