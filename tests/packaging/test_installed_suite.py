"""The conformance suite out of a built wheel, as a backend author has it: not from this checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support import copy_of_checkout, installed, skip_or_fail


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """A wheel of this checkout, built from a copy of it and unpacked."""
    for needed in ("pip", "scikit-build-core"):
        if not installed(needed):
            skip_or_fail(f"building a wheel without a network needs {needed} installed")
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_of_checkout(folder / "source")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"),
            *("--no-build-isolation", "--no-index", "-w", str(folder), str(source)),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("fourbit-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_what_the_wheel_holds(unpacked):
    assert (unpacked / "fourbit_pytest" / "__init__.py").is_file()
    assert (unpacked / "fourbit" / "testing" / "test_quantize.py").is_file()
    assert not list(unpacked.rglob("*example_backend*"))
    assert not list(unpacked.rglob("__pycache__"))


def test_suite_runs_from_the_wheel(unpacked, tmp_path):
    # -S: no .pth files, so that an editable install of this checkout cannot step in
    program = f"""
import sys
sys.path[:0] = {[str(unpacked), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]!r}
import pytest, fourbit
assert fourbit.__file__.startswith({str(unpacked)!r}), fourbit.__file__
sys.exit(pytest.main(sys.argv[1:]))
"""
    tests = [f"fourbit.testing.{name}" for name in ("test_contract", "test_state", "test_embedding")]
    command = [sys.executable, "-S", "-c", program, "--pyargs", *tests, "--backend", "reference", "-q"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "FOURBIT_"))}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "failed" not in done.stdout
