"""The machine and the versions that figures depend on."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fourbit


def about(isa: str | None = None) -> dict[str, Any]:
    """What figures depend on, as JSON values."""
    explained = fourbit.explain("linear_4bit", device="cpu", dtype=torch.bfloat16)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}",
        "versions": {
            "Python": platform.python_version(),
            **{name: _version(name) for name in ("fourbit", "torch", "bitsandbytes")},
        },
        "torch capability": torch.backends.cpu.get_cpu_capability(),
        "isa": isa,
        "backend": f"{explained.backend} ({explained.path})",
        "load": os.getloadavg()[0],
    }


def print_about(about: dict[str, Any]) -> None:
    """The heading of a run."""
    print(f"{about['date']}; {about['machine']}")
    print(", ".join(f"{name} {number}" for name, number in about["versions"].items()))
    print(f"linear_4bit by {about['backend']}; torch with {about['torch capability']}; load {about['load']:.1f}")
    if about["isa"]:
        print(f"held to {about['isa']}: fourbit, torch, oneDNN; NOT bitsandbytes, whose kernels choose for themselves")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
