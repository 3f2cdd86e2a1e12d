"""What another busy process costs: linear_4bit with every core in use, and with one of the cores taken.

    python -m peers.disturbed                  # 4096x4096, M=1, 2 threads

A process that counts, pinned to one core, runs in every second period. A kernel that splits its work evenly and
waits for the slower half takes many times as long then; one that lets idle threads take what is left does not. The
ratio is of medians, disturbed over undisturbed, for fourbit and its peers; weights are cold. The means are printed
too, since a call shorter than the scheduler's time slices is rarely hit, but then waits for a whole slice.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from statistics import median

import torch

from harness import bnb, machine
from harness.timing import Times, milliseconds
from peers import targets
from peers.contenders import CpuWeights, linear_calls

PERIOD = 0.3
BUSY = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"


class Disturber:
    """A process that keeps one core busy inside the `with` block."""

    def __init__(self, core: int) -> None:
        self.core = core

    def __enter__(self) -> None:
        command = [sys.executable, "-S", "-c", BUSY, str(self.core)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise RuntimeError(f"no process could be pinned to core {self.core}")

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def samples(calls, seconds: float, position: list[int]) -> list[float]:
    """Seconds of each call, back to back for `seconds`, on the next copies of the weight; the first two left out."""
    taken = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 5:
        call = calls[position[0] % len(calls)]
        position[0] += 1
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return taken[2:]


def measure(contenders, core: int, periods: int) -> dict[str, tuple[Times, Times, float]]:
    """Of each contender: times undisturbed, disturbed, and the median over periods of the ratio of medians."""
    quiet: dict[str, list[list[float]]] = {name: [] for name in contenders}
    loud: dict[str, list[list[float]]] = {name: [] for name in contenders}
    position = {name: [0] for name in contenders}
    for _ in range(periods):
        for name, calls in contenders.items():
            quiet[name].append(samples(calls, PERIOD, position[name]))
        with Disturber(core):
            for name, calls in contenders.items():
                loud[name].append(samples(calls, PERIOD, position[name]))
    result = {}
    for name in contenders:
        pairs = zip(quiet[name], loud[name], strict=True)
        ratio = median(median(with_it) / median(without) for without, with_it in pairs)
        result[name] = (Times.of(sum(quiet[name], [])), Times.of(sum(loud[name], [])), ratio)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time linear_4bit with and without a busy process beside it.")
    parser.add_argument("--size", type=int, default=4096, help="N and K of the weight")
    parser.add_argument("--m", type=int, default=1, help="rows of x")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--periods", type=int, default=9)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    machine.print_about(machine.about())
    torch.set_num_threads(options.threads)
    weights = CpuWeights((options.size, options.size), bnb.load())
    x = torch.randn(options.m, options.size).bfloat16()
    print(
        f"\n{options.size}² M={options.m} bf16, {options.threads} threads on {len(cores)} cores: median [p10 to p90] ms"
    )
    with torch.no_grad():
        contenders = linear_calls(weights, x)
        found = measure(contenders, cores[-1], options.periods)
    for name, (quiet, loud, ratio) in found.items():
        verdict = ""
        if name == "fourbit":
            verdict = f" ({targets.DISTURBED.describe()}) {targets.DISTURBED.verdict(ratio)}"
        spread = f"{milliseconds(quiet)}, disturbed {milliseconds(loud)}"
        print(f"{name:16s} {spread}, ratio {ratio:.2f}{verdict}; of means {loud.mean / quiet.mean:.2f}")


if __name__ == "__main__":
    main()
