"""How much of the machine other processes took while something was timed (Linux; elsewhere unknown)."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")


class Others:
    """Starts counting when made; `share` is the part of one core that others used since, 1.0 being a whole core."""

    def __init__(self) -> None:
        self.busy, self.own, self.wall = _busy_seconds(), time.process_time(), time.perf_counter()

    def share(self) -> float | None:
        """Of one core; None if the system does not say. What a host takes from a virtual machine counts too."""
        busy = _busy_seconds()
        if busy is None or self.busy is None:
            return None
        theirs = (busy - self.busy) - (time.process_time() - self.own)
        return max(0.0, theirs / (time.perf_counter() - self.wall))


def _busy_seconds() -> float | None:
    try:
        fields = _STAT.read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
