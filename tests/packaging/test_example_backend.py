"""plugins/example_backend, the third-party backend to copy: short, installable by pip alone, and conformant."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import installed as is_installed
from tests.support import skip_or_fail

SOURCE = Path(__file__).parents[2] / "plugins" / "example_backend"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """The environment of a process in which the example is installed, from a copy since building writes files."""
    if not is_installed("setuptools"):
        skip_or_fail("plugins/example_backend is built with setuptools, which is not installed")
    if not is_installed("pip"):
        skip_or_fail("pip is not installed")
    folder = tmp_path_factory.mktemp("example")
    copy = shutil.copytree(SOURCE, folder / "source")
    target = folder / "site"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--no-build-isolation", "--no-index", "--target", str(target), str(copy)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    path = os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")]))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FOURBIT_", "PYTEST_"))}
    return clean | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def python(env: dict[str, str], program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def suite(env: dict[str, str], cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "--pyargs", *arguments, "--backend", "example", "-q"]
    command += ["-p", "no:cacheprovider"]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=900)


def test_at_most_60_lines_of_python():
    lines = [line for path in SOURCE.glob("*.py") for line in path.read_text().splitlines()]
    assert 0 < len(lines) <= 60


def test_it_is_whole():
    assert {path.name for path in SOURCE.iterdir()} >= {"pyproject.toml", "README.md", "fourbit_example_backend.py"}


def test_listed_and_used_only_when_asked(installed):
    program = """
import json, torch, fourbit
from fourbit import dispatch
w = torch.randn(8, 64)
packed, state = fourbit.quantize_4bit(w)
usual = {r.backend.name for r in dispatch.resolutions()}
with fourbit.use_backend("example"):
    assert torch.equal(fourbit.quantize_4bit(w)[0], packed)
    asked = {r.backend.name for r in dispatch.resolutions()}
    try:
        fourbit.linear_4bit(torch.randn(2, 64).half(), packed, state)
        declined = ""
    except fourbit.NoBackendError as error:
        declined = str(error)
infos = [(i.name, i.state, i.source) for i in fourbit.backends()]
print(json.dumps([infos, sorted(usual), sorted(asked), declined]))
"""
    infos, usual, asked, declined = json.loads(python(installed, program))
    (example,) = [info for info in infos if info[0] == "example"]
    assert example[1] == "ready" and "fourbit-example-backend 0.1.0" in example[2]
    assert "example" not in usual and asked == ["example"]
    assert "the pretend chip has no float16" in declined


def test_chosen_by_the_environment(installed):
    """FOURBIT_BACKENDS puts it first; what it declines goes to the next."""
    env = installed | {"FOURBIT_BACKENDS": "example,reference", "FOURBIT_TRACE": "1"}
    program = """
import torch, fourbit
for dtype in (torch.float32, torch.float16):
    fourbit.quantize_4bit(torch.randn(64, dtype=dtype))
"""
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "quantize_4bit on cpu (float32, blocksize 64) -> example" in done.stderr
    assert "-> reference; not example: the pretend chip has no float16" in done.stderr


@pytest.mark.long
def test_conformance(installed, tmp_path):
    """The whole suite passes, and what the example declines is seen to be skipped."""
    done = suite(installed, tmp_path, "fourbit.testing")
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr
    assert "declines quantize_4bit on cpu (float16, blocksize 64): the pretend chip has no float16" in done.stdout
    assert "its block buffer holds 1024 elements, not 4096" in done.stdout
