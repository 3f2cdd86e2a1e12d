"""Installing where there is no C++ compiler succeeds: the reference serves, and `fourbit backends` says why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support import copy_of_checkout, installed, skip_or_fail

PROGRAM = """
import json, sys
sys.path[:0] = PATHS
import torch, fourbit
w = torch.randn(20, 70)
packed, state = fourbit.quantize_4bit(w, double_quant=True)
y = fourbit.linear_4bit(torch.randn(3, 70), packed, state)
info = {i.name: [i.state, i.reason] for i in fourbit.backends()}
print(json.dumps([fourbit.__file__, info, fourbit.explain("linear_4bit").backend, list(y.shape)]))
"""


def install(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """pip install of a copy of this checkout, with no compiler in reach but with CMake and Ninja."""
    for needed in ("pip", "scikit-build-core"):
        if not installed(needed):
            skip_or_fail(f"building without a network needs {needed} installed")
    tools = folder / "bin"
    tools.mkdir()
    for tool in ("cmake", "ninja"):
        found = shutil.which(tool)
        if found is None:
            skip_or_fail(f"building without build isolation needs {tool}")
        (tools / tool).symlink_to(found)
    source = copy_of_checkout(folder / "source")
    nothing = str(tools / "no-compiler")  # CMake looks in /usr/bin whatever PATH says, unless told a compiler
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FOURBIT_", "CMAKE_", "SKBUILD"))}
    env |= {"PATH": str(tools), "CXX": nothing, "CC": nothing}
    command = [
        *(sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"),
        *("--no-index", "--target", str(folder / "site"), *options, str(source)),
    ]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def test_installs_and_the_reference_serves(tmp_path):
    done = install(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((tmp_path / "site").rglob("_native*.so"))
    paths = [str(tmp_path / "site"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    env = {name: value for name, value in os.environ.items() if not name.startswith("FOURBIT_")}
    # -S: no .pth files, so that an editable install of this checkout cannot step in
    command = [sys.executable, "-S", "-c", PROGRAM.replace("PATHS", repr(paths))]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    file, info, backend, shape = json.loads(done.stdout)
    assert file.startswith(str(tmp_path))
    assert info["cpu"][0] == "unavailable" and "compiler" in info["cpu"][1]
    assert backend == "reference" and shape == [3, 20]


@pytest.mark.parametrize("option", ("-Ccmake.define.FOURBIT_REQUIRE_NATIVE=ON",))
def test_fails_where_the_kernels_are_required(tmp_path, option):
    done = install(tmp_path, option)
    assert done.returncode != 0
    assert "no C++ compiler found" in done.stdout + done.stderr
