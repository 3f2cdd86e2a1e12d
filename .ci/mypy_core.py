"""mypy --strict on the working tree as the package `fourbit`: a temporary folder links core/, backends/, plugins/."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

with tempfile.TemporaryDirectory() as folder:
    package = Path(folder) / "fourbit"
    package.mkdir()
    (package / "plugins").mkdir()
    (package / "backends").symlink_to(ROOT / "backends")
    for folder_in, folder_out in (("core", package), ("plugins", package / "plugins")):
        for source in (ROOT / folder_in).iterdir():
            if source.name != "example_backend":  # a distribution of its own
                (folder_out / source.name).symlink_to(source)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), "-p", "fourbit"]
    sys.exit(subprocess.run(command, cwd=folder, env={**os.environ, "MYPYPATH": folder}).returncode)
