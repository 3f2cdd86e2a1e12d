"""An editable install puts the folders themselves on the path, new files included, and builds the kernels in place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.support import copy_of_checkout, installed, skip_or_fail

PROGRAM = """
import importlib, json, torch
import fourbit, fourbit_new
names = ["fourbit", "fourbit.cli", "fourbit_pytest", "fourbit_cpu", "fourbit_gpu", "fourbit_cuda", "fourbit_rocm",
         "fourbit_models", "fourbit_demo", "fourbit_new"]
files = {name: importlib.import_module(name).__file__ for name in names}
states = {info.name: info.state for info in fourbit.backends() if info.source.startswith("fourbit ")}
print(json.dumps([files, states]))
"""


@pytest.mark.long
def test_every_package_is_the_folder_itself(tmp_path):
    for needed in ("pip", "scikit-build-core"):
        if not installed(needed):
            skip_or_fail(f"building without a network needs {needed} installed")
    source = copy_of_checkout(tmp_path / "source")
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    places = {"base": str(tmp_path / "env"), "platbase": str(tmp_path / "env")}
    # what this session has, after what is installed there
    site = Path(sysconfig.get_path("purelib", vars=places))
    (site / "zz_session.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FOURBIT_", "PYTHON"))}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install"]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-Ccmake.define.FOURBIT_REQUIRE_NATIVE=ON"]
    done = subprocess.run([*pip, *options, "-e", str(source)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (source / "plugins" / "fourbit_new.py").write_text("")
    done = subprocess.run([python, "-c", PROGRAM], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    files, states = json.loads(done.stdout)
    assert {name: Path(file).is_relative_to(source) for name, file in files.items()} == dict.fromkeys(files, True)
    assert states["cpu"] == states["reference"] == "ready", states
