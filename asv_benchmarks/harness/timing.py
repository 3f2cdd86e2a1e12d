"""Times of contenders in one process: round-robin, cold weights, medians with their spread, and the read bandwidth.

Two rules make ratios hold on a machine that is not quiet. Contenders take turns, in a new order each round, so that
whatever disturbs one disturbs all. And each contender rotates through copies of its weight, so that more than
`COLD_BYTES` pass before one is read again: a decoder finds its weights in memory, not in the cache.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

COLD_BYTES = 256 << 20
READ_BYTES = 640 << 20
SHORT_SECONDS = 0.005


def copies_for(weight_bytes: int, cold_bytes: int = COLD_BYTES) -> int:
    """How many copies of a weight make more than `cold_bytes` pass before one is used again."""
    return max(1, cold_bytes // max(weight_bytes, 1) + 1)


@dataclass(frozen=True)
class Times:
    """Seconds a call: the median of `count` calls, what 10 % and 90 % of them stay below, the least and the mean."""

    median: float
    p10: float
    p90: float
    least: float
    mean: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Times:
        """Summary of at least one sample."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        p10, p90 = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
        return cls(median(ordered), p10, p90, ordered[0], sum(ordered) / len(ordered), len(ordered))


def milliseconds(times: Times) -> str:
    """ "0.308 [0.301 to 0.322]": the median, and what 10 % and 90 % stay below."""
    if times.count == 1:
        return f"{times.median * 1e3:.4g}"
    return f"{times.median * 1e3:.4g} [{times.p10 * 1e3:.4g} to {times.p90 * 1e3:.4g}]"


def interleave(
    contenders: dict[str, Sequence[Callable[[], object]]],
    seconds: float,
    *,
    rounds: tuple[int, int] = (5, 61),
    burst: int = 4,
    seed: int = 0,
) -> dict[str, Times]:
    """Time contenders in turn for about `seconds`, with at least `rounds[0]` and at most `rounds[1]` rounds.

    A contender is a sequence of calls, one for each copy of its weight. A call shorter than 5 ms runs `burst` times
    a turn, each on the next copy, and the first of them is not counted: it finds the code and the thread pool in
    whatever state the contender before it left them. The results of a call are freed outside its time.
    """
    shuffled = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    position = dict.fromkeys(contenders, 0)

    def once(name: str) -> float:
        calls = contenders[name]
        call = calls[position[name] % len(calls)]
        position[name] += 1
        begin = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - begin
        del result
        return elapsed

    expected = {name: once(name) for name in contenders}  # the first calls, not counted
    expected = {name: min(first, once(name)) if first < 0.2 else first for name, first in expected.items()}
    names = list(contenders)
    begin = time.perf_counter()
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() - begin > seconds:
            break
        shuffled.shuffle(names)
        for name in names:
            repeat = burst if expected[name] < SHORT_SECONDS else 1
            taken = [once(name) for _ in range(repeat)]
            samples[name] += taken[1:] if repeat > 1 else taken
    return {name: Times.of(values) for name, values in samples.items()}


class ReadBandwidth:
    """A streaming read of a buffer that no cache holds, as a contender beside what reads weights.

    Each call is torch's sum of 128 MiB of float32, the next part of the buffer: the fastest read among torch's and
    numpy's reductions (seen with 1 thread: sum 42 GB/s, amax 38, dot 36). The buffer lies in pages of 4 KiB unless
    the system gives huge ones unasked. On a virtual machine the limit of 2 threads depends on which physical cores
    the host gives them at the moment (seen: 50 and 77 GB/s, within minutes), so it means something only beside
    times that were taken in turn with it.
    """

    def __init__(self, size: int = READ_BYTES, part: int = 128 << 20) -> None:
        self.part = part
        self.parts = torch.ones(size // part, part // 4).unbind(0)

    def calls(self) -> list[Callable[[], object]]:
        """As a contender of `interleave`."""
        return [part.sum for part in self.parts]

    def best(self, times: Times) -> float:
        """GB/s that 90 % of the reads stayed below: the best but for luck."""
        return self.part / times.p10 / 1e9

    @staticmethod
    def steady(times: Times) -> bool:
        """Whether the limit stayed the same meanwhile, within a quarter."""
        return times.p90 < 1.25 * times.p10
