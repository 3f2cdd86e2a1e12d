"""kill -9 of processes that work together: see kill_together.py, which runs in a process of its own, since it forks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).parents[3]


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "arguments",
    (("--points", "10"), ("--points", "5", "--pipeline")),
    ids=("model", "pipeline"),
)
def test_kills(arguments):
    command = [sys.executable, str(Path(__file__).with_name("kill_together.py")), *arguments]
    path = os.pathsep.join([*sys.path, str(TREE)])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "PYTHONPATH": path}, cwd=TREE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every byte is that of the uninterrupted run" in done.stdout
