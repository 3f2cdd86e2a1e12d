"""`torchrun … -m fourbit`: the command in several processes, as a shell sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from fourbit.checkpoint.processes import Processes, from_environment
from fourbit.checkpoint.staging import unfinished_folder
from tests.folders import contents, write_folder

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def run(*arguments, command=(sys.executable, "-m", "fourbit")):
    line = [*command, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, encoding="utf-8", timeout=600)


def torchrun(count, *arguments):
    return run(*arguments, command=(*TORCHRUN, "--nproc-per-node", str(count), "-m", "fourbit"))


def test_the_package_is_the_command():
    done = run("--version")
    assert done.returncode == 0 and done.stdout.startswith("fourbit 0.")


@pytest.mark.parametrize(
    ("environment", "want"),
    (
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Processes(3, 4, 1)),
        ({"RANK": "0", "WORLD_SIZE": "4"}, None),  # of a cluster's manager, which starts one process a machine
        ({"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, None),
        ({"RANK": "x", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, None),
    ),
)
def test_what_the_environment_says(environment, want):
    assert from_environment(environment) == want


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="torchrun needs more there")
def test_two_processes(tmp_path):
    src = write_folder(tmp_path / "src", shards=2)
    assert run("quantize", src, tmp_path / "want", "--max-shard-size", "9KB").returncode == 0
    done = torchrun(2, "quantize", src, tmp_path / "dst", "--max-shard-size", "9KB")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "dst") == contents(tmp_path / "want")
    assert done.stdout.count(" -> ") == 1 and "2 processes do this together" in done.stderr
    assert torchrun(2, "quantize", src, tmp_path / "none", "--dry-run").stdout.count("dry run") == 1
    again = torchrun(2, "quantize", src, tmp_path / "dst")
    assert again.returncode == 1 and "exists already" in again.stderr and "Traceback" not in again.stdout


@pytest.mark.long
@pytest.mark.parametrize("rank", (0, 1))
def test_one_is_called_wrongly(tmp_path, rank):
    """As where one machine has no such device: the other process does not wait for one that has ended."""
    src = write_folder(tmp_path / "src")
    children = []
    for each in (0, 1):
        line = [sys.executable, "-m", "fourbit", "quantize", str(src), str(tmp_path / "dst")]
        line += ["--device", "nosuch"] if each == rank else []
        environment = {**os.environ, "RANK": str(each), "WORLD_SIZE": "2", "LOCAL_RANK": str(each)}
        children.append(subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True, encoding="utf-8"))
    said = [child.communicate(timeout=120)[1] for child in children]  # they wait for 300 s
    assert all(child.returncode for child in children) and all("nosuch" in each for each in said), said
    assert f"process {rank} (" in " ".join(said[1 - rank].split()) and os.listdir(tmp_path) == ["src"]


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="needs kill -9")
def test_one_is_killed(tmp_path):
    """torchrun ends the others; the same command with --resume continues."""
    from tests.core.crash.kill_resume import make_source

    src = make_source(tmp_path / "src")
    assert run("quantize", src, tmp_path / "want").returncode == 0
    line = [*TORCHRUN, "--nproc-per-node", "2", "-m", "fourbit", "quantize", str(src), str(tmp_path / "dst")]
    child = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = unfinished_folder(tmp_path / "dst") / "parts"
    end = time.monotonic() + 300
    while not any(path.stat().st_size for path in parts.glob("*.part")) and child.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.001)
    with open(f"/proc/{child.pid}/task/{child.pid}/children") as stream:
        pids = [int(pid) for pid in stream.read().split()]
    if len(pids) == 2:  # or it was faster
        os.kill(pids[1], signal.SIGKILL)
        assert child.wait(300) != 0 and not (tmp_path / "dst").exists()
    child.wait(300)
    done = torchrun(3, "quantize", src, tmp_path / "dst", "--resume")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "dst") == contents(tmp_path / "want")
