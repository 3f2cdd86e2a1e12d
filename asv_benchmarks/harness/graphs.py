"""Calls on a CUDA device, timed by replays of a graph: the contenders in turn, their weights cold."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import median

import torch

Call = Callable[[], object]

COLD_BYTES = 150_000_000
"""More than a second-level cache holds."""

LEAD_CYCLES = 200_000
"""For which the device spins before a timed replay: about 0.1 ms, in which the host queues the rest."""


@dataclass
class Contender:
    """Calls of one contender, each on another copy of the weight, and the bytes that one has to move."""

    calls: list[Call]
    bytes: float
    replay: Call | None = None
    note: str = ""
    samples: list[float] = field(default_factory=list)

    def prepare(self) -> None:
        """Warm up and capture; falls back to plain calls."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # where weights and x are made
        with torch.cuda.stream(stream):
            for call in self.calls[:2]:
                call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream), synchronizing_raises():  # else a capture would break in its middle
                self.calls[0]()
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                for call in self.calls:
                    call()
            self.replay = graph.replay
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.note = f"events, no graph: {str(error).splitlines()[0][:60]}"
            self.replay = self.one_by_one
        self.replay()
        torch.cuda.synchronize()

    def one_by_one(self) -> None:
        """All calls, each queued by the host."""
        for call in self.calls:
            call()

    def run(self) -> None:
        """One timed replay."""
        assert self.replay is not None
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(LEAD_CYCLES)
        start.record()
        self.replay()
        end.record()
        end.synchronize()
        self.samples.append(start.elapsed_time(end) * 1e3 / len(self.calls))


@contextmanager
def synchronizing_raises() -> Iterator[None]:
    """A call that waits for the device raises RuntimeError meanwhile."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is called a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def cycled(calls: Sequence[Call], count: int) -> list[Call]:
    """`count` calls, through `calls` again and again: what a replay costs as a whole is then shared by as many."""
    return list(islice(cycle(calls), count))


def measure(contenders: dict[str, Contender], rounds: int) -> dict[str, tuple[float, float, str]]:
    """`{name: (median microseconds, GB/s, note)}`, the contenders in turn."""
    for contender in contenders.values():
        contender.prepare()
    for _ in range(rounds):
        for contender in contenders.values():
            contender.run()
    return {
        name: (m := median(c.samples), c.bytes / m / 1e3, c.note)  # bytes a microsecond are MB/s
        for name, c in contenders.items()
    }


def copy_bandwidth(rounds: int) -> float:
    """GB/s, read plus written, of the faster of a copy by kernel and by the driver."""
    source = torch.randint(0, 1 << 30, (1 << 27,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    moved = 2.0 * source.numel() * 4
    by_kernel = Contender([lambda: torch.bitwise_not(source, out=target)], moved)
    by_driver = Contender([lambda: target.copy_(source)], moved)
    return max(speed for _, speed, _ in measure({"kernel": by_kernel, "driver": by_driver}, rounds).values())
