"""Settings of the whole test run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Processes that a test spawns import its module anew, as `tests.…`; last in the path, so that what is installed wins.
sys.path.append(str(Path(__file__).parents[1]))

# xdist gives its workers a terminal's width, which would break tables that a test reads as a pipe does.
os.environ.pop("COLUMNS", None)

pytest_plugins = ["tests.long_tests"]

# No deadline: a shared machine's hiccup is no bug. What an example found stays in .hypothesis/.
settings.register_profile("fourbit", deadline=None)
settings.load_profile("fourbit")

# Each xdist worker takes its share of the cores; more threads than cores makes torch several times slower.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    torch.set_num_threads(max((os.cpu_count() or 1) // _workers, 1))


@pytest.fixture(autouse=True)
def _compilers():
    """peft's BOFT sets CC and CXX to gcc for good, and what torch.compile then builds lacks the C++ library."""
    before = {name: os.environ.get(name) for name in ("CC", "CXX")}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
