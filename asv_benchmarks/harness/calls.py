"""Times of calls that take microseconds: interleaved, so that a busy machine slows all of them alike."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median


def microseconds(calls: dict[str, Callable[[], object]], rounds: int = 101, batch: int = 300) -> dict[str, float]:
    """Median microseconds a call, over `rounds` rounds of `batch` calls of each, in turn."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(batch):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            steps = range(batch)
            start = time.perf_counter_ns()
            for _ in steps:
                call()
            samples[name].append((time.perf_counter_ns() - start) / batch / 1e3)
    return {name: median(values) for name, values in samples.items()}


IMPORT_CODE = """
import time, torch
start = time.perf_counter()
import fourbit
print(time.perf_counter() - start)
"""


def import_milliseconds(runs: int = 15) -> list[float]:
    """What `import fourbit` costs after `import torch`, in fresh processes; sorted. The first, cold one is left out."""
    values = []
    for _ in range(runs + 1):
        output = subprocess.run([sys.executable, "-c", IMPORT_CODE], check=True, capture_output=True, text=True).stdout
        values.append(float(output) * 1e3)
    return sorted(values[1:])
