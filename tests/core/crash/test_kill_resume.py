"""kill -9 at random moments: see kill_resume.py, which runs in a process of its own, since it forks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fifty_kills():
    command = [sys.executable, str(Path(__file__).with_name("kill_resume.py")), "--points", "50"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every byte is that of the uninterrupted run" in done.stdout
