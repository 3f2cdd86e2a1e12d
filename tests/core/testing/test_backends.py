"""The conformance suite, with the command that backend authors use, on every built-in backend that is ready."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

import fourbit
from tests.support import skip_or_fail, skip_without_device

BUILT_IN = sorted(ep.name for ep in entry_points(group="fourbit.backends") if ep.dist.name == "fourbit")


def run_suite(*arguments: str, cwd: str) -> subprocess.CompletedProcess[str]:
    """`pytest --pyargs fourbit.testing` with more arguments, in a folder that has no configuration."""
    command = [sys.executable, "-m", "pytest", "--pyargs", "fourbit.testing", "-q", "-p", "no:cacheprovider"]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # this worker's share
    return subprocess.run([*command, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.long
@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_backend(name, tmp_path):
    (info,) = [info for info in fourbit.backends() if info.name == name]
    if info.state != "ready":
        without = skip_or_fail if "cpu" in info.device_types else skip_without_device
        without(f"backend {name} is {info.state}: {info.reason}")
    done = run_suite("--backend", name, cwd=tmp_path)
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr
    assert " passed" in done.stdout and "FOURBIT_TEST_HUGE=1" in done.stdout  # what is left out is said


def test_without_a_backend_it_says_what_to_do(tmp_path):
    done = run_suite(cwd=tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--backend NAME" in done.stderr and "reference" in done.stderr


def test_unknown_backend(tmp_path):
    done = run_suite("--backend", "nonesuch", cwd=tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no ready backend 'nonesuch'" in done.stderr and "ready here: " in done.stderr


def test_a_device_that_the_machine_or_the_backend_lacks(tmp_path):
    done = run_suite("--backend", "reference", "--device", "xpu", cwd=tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR or "on xpu" in done.stdout
