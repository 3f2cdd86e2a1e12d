"""Weights chosen to hurt a quantizer: extremes of float32, ties, zeros, and values beside the thresholds."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.codebooks import FP4, NF4, Codebook, thresholds

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_UNORDERED = (0.6, -1.0, 0.02, 0.25, -0.5, 0.25, -0.03, 1.0, 0.1, -0.7, 0.4, -0.2, 0.8, -0.35, 0.06, -0.1)
_ONE_SIDED = (1.0, 0.85, 0.7, 0.55, 0.42, 0.3, 0.19, 0.09, 0.0, -0.08, -0.17, -0.28, -0.4, -0.54, -0.7, -0.88)

CODEBOOKS = {
    "nf4": NF4,
    "fp4": FP4,
    "unordered": Codebook("unordered", _UNORDERED),  # no exact zero, and one value twice
    "signed": Codebook("signed", _ONE_SIDED, signed_scale=True),
}
"""Both built-in data types and two that only a backend that takes the table as an argument gets right."""


def generator(seed: int = 0) -> torch.Generator:
    """A generator of its own, so that one test's data do not depend on another's."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Float32 normal deviates on the CPU."""
    return torch.randn(shape, generator=generator(seed))


def _uniform(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=generator(seed)) * 2 - 1


def _outliers(count: int) -> Tensor:
    """One large element in each 32, first, last and between."""
    w = normal(count) * 1e-3
    for position in range(0, count - 1, 32):
        w[position + (position // 32 * 31) % min(32, count - position)] = -1e3 if position % 64 else 7e4
    return w


def _around_smallest_normal(count: int) -> Tensor:
    """Magnitudes on both sides of 2^-126, where 1/absmax overflows or nearly does."""
    steps = torch.linspace(-3, 3, -(-count // 32)).repeat_interleave(32)[:count]
    return _uniform(count) * 2.0**-126 * 2**steps


def _half_zero(count: int) -> Tensor:
    w = normal(count)
    w.view(-1)[: count // 2] = 0
    return w


def _signed_zeros(count: int) -> Tensor:
    w = torch.zeros(count)
    w[::3] = -0.0
    return w


def _ties(count: int) -> Tensor:
    """+m and -m both reach a block's absmax."""
    w = normal(count) * 0.1
    w[3::32], w[9::32] = -0.75, 0.75
    w[64 + 5 :: 128] = 0.75
    return w


PLAIN = {
    "normal": lambda n: normal(n),
    "uniform": lambda n: _uniform(n),
    "heavy-tailed": lambda n: normal(n) ** 7,
    "wide": lambda n: normal(n) * 10.0 ** (20 * _uniform(n, seed=1)),
    "tiny": lambda n: normal(n) * 1e-30,
    "subnormal": lambda n: normal(n) * 1e-40,
    "smallest subnormal": lambda n: (normal(n) > 0) * 2.0**-149,
    "around 2^-126": _around_smallest_normal,
    "huge": lambda n: _uniform(n) * 1e38,
    "largest float": lambda n: _uniform(n).sign() * torch.finfo(torch.float32).max,
    "constant": lambda n: torch.full((n,), 0.3),
    "negative constant": lambda n: torch.full((n,), -0.3),
    "zeros": lambda n: torch.zeros(n),
    "signed zeros": _signed_zeros,
    "half zero": _half_zero,
    "outliers": _outliers,
    "ties": _ties,
}
"""Name to a function from an element count to a float32 weight."""


def half_precision_extremes(dtype: torch.dtype) -> Tensor:
    """Every bit pattern of a 16-bit dtype, but NaN and Inf, in blocks of like magnitude and then shuffled."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    values = values[torch.isfinite(values)]
    values = values[values.float().abs().argsort(stable=True)]
    shuffled = values[torch.randperm(len(values), generator=generator())]
    return torch.cat([values, shuffled])


def beside_thresholds(codebook: Codebook, blocksize: int) -> Tensor:
    """Normalized values exactly at each threshold and up to two ulps beside it, for several scales."""
    edges, _ = thresholds(codebook.tensor())
    near = [edges, edges]
    for towards in (-2.0, 2.0):
        step = edges
        for _ in range(2):
            step = torch.nextafter(step, torch.tensor(towards))
            near.append(step)
    values = torch.cat(near)
    blocks = []
    for scale in (1.0, 2.0**-20, 2.0**30, 3.7, 0.1, 1.9999999, 1e-20, 7.3e12):
        for part in values.split(blocksize - 1):
            part = torch.nn.functional.pad(part, (0, blocksize - 1 - len(part)))
            scaled = torch.cat([torch.ones(1), part]) * scale
            blocks += [scaled, -scaled]
    return torch.cat(blocks)


def non_finite(blocksize: int) -> tuple[Tensor, Tensor]:
    """`(w, bad)`: six blocks and a short one, some with NaN or Inf, and a mask of the elements they spoil."""
    w = normal(6 * blocksize + blocksize // 2)
    w[3] = torch.nan
    w[2 * blocksize] = torch.inf
    w[5 * blocksize - 1] = -torch.inf
    w[5 * blocksize : 5 * blocksize + 2] = torch.tensor([torch.inf, torch.nan])
    w[-1] = -torch.nan
    block = torch.arange(len(w)) // blocksize
    return w, torch.isin(block, torch.tensor([0, 2, 4, 5, 6]))
