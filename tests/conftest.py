"""Settings of the whole test run."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from hypothesis import settings

# Processes that a test spawns import its module anew, as `tests.…`; last in the path, so that what is installed wins.
sys.path.append(str(Path(__file__).parents[1]))

# xdist gives its workers a terminal's width, which would break tables that a test reads as a pipe does.
os.environ.pop("COLUMNS", None)

# No deadline: a shared machine's hiccup is no bug. What an example found stays in .hypothesis/.
settings.register_profile("fourbit", deadline=None)
settings.load_profile("fourbit")

# Each xdist worker takes its share of the cores; more threads than cores makes torch several times slower.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    torch.set_num_threads(max((os.cpu_count() or 1) // _workers, 1))
    # Two workers that compile the same code at once: inductor loads what the other has written half of.
    _cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.path.join(tempfile.gettempdir(), "fourbit-inductor")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(_cache, os.environ["PYTEST_XDIST_WORKER"])
