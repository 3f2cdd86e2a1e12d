"""How long a CUDA device was busy, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def busy_milliseconds(run: Callable[[], object]) -> float:
    """In which kernels and copies ran while `run` was called, until all were done; 0 where the profiler saw none."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return union_milliseconds(profiler.events())


def union_milliseconds(events: Iterable[Any]) -> float:
    """Of the device's events, each moment once, as launches may overlap; not the annotations on the same track."""
    kind = torch.autograd.DeviceType.CUDA
    mine = [e.time_range for e in events if e.device_type == kind and not getattr(e, "is_user_annotation", False)]
    busy, end = 0.0, float("-inf")
    for span in sorted(mine, key=lambda span: span.start):
        busy += max(0.0, span.end - max(end, span.start))
        end = max(end, span.end)
    return busy / 1e3
