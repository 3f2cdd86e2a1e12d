"""The benchmarks of several processes run, in small, on CPUs. No time is asserted."""

import subprocess
import sys

import pytest

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
SMALL = ("--layers", "1", "--hidden", "256", "--inner", "512", "--prompt", "16")
COMMANDS = {
    "tensor_parallel": (
        (*TORCHRUN, "peers.tensor_parallel", "--device", "cpu", "--rounds", "2", *SMALL),
        ("2 processes, decode, batch 8, eager: bf16", "2 processes, prefill of 16: bf16"),
    ),
    "all_reduce": ((*TORCHRUN, "peers.all_reduce", "--device", "cpu", "--rounds", "2"), ("| 512 × 16384 | 16777 |",)),
    "processes": (
        ("-m", "peers.processes", "--counts", "2", "--size-gb", "0.02"),
        ("bound of each process's memory: ", "\n        2 ", "the same\n"),
    ),
}
"""Of each script the command, and what is among what it prints."""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="they are written for Linux")
@pytest.mark.parametrize("name", COMMANDS)
def test_it_runs(benchmarks, name):
    command, texts = COMMANDS[name]
    done = subprocess.run([sys.executable, *command], cwd=benchmarks, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in texts:
        assert text in done.stdout
