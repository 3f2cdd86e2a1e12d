"""Scratch memory that cannot be had: an error in Python, whichever thread wanted it, and the next call works."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys

import pytest

from tests.support import skip_or_fail

SHIM = r"""
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
/* Fails for the main thread (1), for the others (2), or for none (0). The kernels alone use this function. */
int failing = 0, failures = 0;
void *aligned_alloc(size_t alignment, size_t size) {
  void *result = NULL;
  int other = syscall(SYS_gettid) != getpid();
  if (failing & (1 << other)) { __sync_fetch_and_add(&failures, 1); return NULL; }
  return posix_memalign(&result, alignment, size) == 0 ? result : NULL;
}
"""

COMMON = """
import ctypes, re, sys, torch, fourbit
torch.manual_seed(0)
torch.set_num_threads(2)
torch.ones(1 << 20).mul(2)  # torch's threads begin here
"""

# in the order of the scratch that a task needs: what a thread has from one call would do for a smaller one
INJECTED = (
    COMMON
    + """
shim = ctypes.CDLL(sys.argv[1])
failing, failures = (ctypes.c_int.in_dll(shim, name) for name in ("failing", "failures"))
n, k = 768, 1536
packed, state = fourbit.quantize_4bit(torch.randn(n, k))
experts, stacked = fourbit.quantize_4bit(torch.randn(2, n, k))
w, we = fourbit.dequantize_4bit(packed, state), fourbit.dequantize_4bit(experts, stacked)
ends = torch.tensor([300, 600])
weight = (packed, state.absmax, state.code, state.blocksize)
stack = (experts, stacked.absmax, stacked.code, stacked.blocksize)
ops, x, g = torch.ops.fourbit, torch.randn(600, k), torch.randn(600, n)
calls = [
    ("linear_4bit", lambda: ops.linear_4bit(x[:1], *weight, n), lambda: x[:1] @ w.T),
    ("linear_4bit", lambda: ops.linear_4bit(x[:16], *weight, n), lambda: x[:16] @ w.T),
    ("grouped_linear_4bit", lambda: ops.grouped_linear_4bit(x, ends, *stack, n),
     lambda: torch.cat([x[:300] @ we[0].T, x[300:] @ we[1].T])),
    ("linear_4bit", lambda: ops.linear_4bit(x, *weight, n), lambda: x @ w.T),
    ("grouped_linear_4bit_grad", lambda: ops.grouped_linear_4bit_grad(g, ends, *stack, k),
     lambda: torch.cat([g[:300] @ we[0], g[300:] @ we[1]])),
    ("linear_4bit_grad", lambda: ops.linear_4bit_grad(g, *weight, k), lambda: g @ w),
]
with fourbit.use_backend("cpu"):
    for op, run, want in calls:
        for attempt in range(100):  # another thread need not come for a task each time
            failing.value, failures.value = int(sys.argv[2]), 0
            try:
                run()
            except RuntimeError as error:
                assert failures.value, error
                assert re.match(rf"{op}: no memory for \\d+ bytes of scratch; fewer rows", str(error)), error
                break
            finally:
                failing.value = 0
            assert not failures.value, f"{op}: a failure that was not reported"
        else:
            raise SystemExit(f"{op}: nothing has failed")
        torch.testing.assert_close(run(), want(), rtol=1e-3, atol=1e-3)
"""
)

LIMITED = (
    COMMON
    + """
import resource
def virtual():
    return int(re.search(r"VmSize:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
rows, k = 2048, 16384
packed, state = fourbit.quantize_4bit(torch.randn(64, k))
x = torch.zeros(rows, k)
x[:, ::999] = 1
with fourbit.use_backend("cpu"):
    fourbit.linear_4bit(x[:16], packed, state)
    before = virtual()
    resource.setrlimit(resource.RLIMIT_AS, (before + (64 << 20), resource.RLIM_INFINITY))
    for attempt in range(30):
        try:
            fourbit.linear_4bit(x, packed, state)
        except RuntimeError as error:
            assert f"linear_4bit: no memory for {rows * k * 4} bytes of scratch" in str(error), error
        else:
            raise SystemExit("there was memory")
        fourbit.linear_4bit(x[:16], packed, state)
    after = virtual()
    assert after <= before + (16 << 20), f"leaked {after - before}"
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    want = x @ fourbit.dequantize_4bit(packed, state).T
    torch.testing.assert_close(fourbit.linear_4bit(x, packed, state), want, rtol=1e-3, atol=1e-3)
"""
)


def run(program: str, *args: str, **env: str) -> None:
    if platform.system() != "Linux":
        skip_or_fail("written for Linux: LD_PRELOAD, /proc and RLIMIT_AS")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FOURBIT_")}
    command = [sys.executable, "-c", program, *args]
    done = subprocess.run(command, env=clean | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    compiler = os.environ.get("CC", "cc")
    if shutil.which(compiler) is None:
        skip_or_fail(f"{compiler}, a C compiler, is not installed")
    folder = tmp_path_factory.mktemp("shim")
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


@pytest.mark.parametrize("thread", (1, 2), ids=("the caller", "torch's threads"))
def test_an_allocation_that_fails(shim, thread):
    run(INJECTED, shim, str(thread), LD_PRELOAD=shim)


def test_an_address_space_that_is_full():
    """No leak either: as much is reserved after thirty failures as before."""
    # one heap: glibc reserves 64 MB for a thread that allocates while another does, which is no leak
    run(LIMITED, MALLOC_ARENA_MAX="1")
