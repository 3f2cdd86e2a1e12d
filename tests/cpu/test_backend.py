"""The CPU backend in this process: instruction sets, threads, precision, and what happens without its kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fourbit
from fourbit.backend import OPS
from fourbit.testing.inputs import normal
from fourbit.testing.oracle import assert_same_bits, make_weight
from tests.support import skip_or_fail


@pytest.fixture(autouse=True)
def cpu():
    """The backend, which alone runs every op."""
    (info,) = [info for info in fourbit.backends() if info.name == "cpu"]
    if info.state != "ready":
        skip_or_fail(f"backend cpu is {info.state}: {info.reason}")
    with fourbit.use_backend("cpu") as backend:
        yield backend


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def instruction_sets() -> list[str]:
    try:
        from fourbit_cpu import _native
    except ImportError:
        return []
    return _native.instruction_sets()


def python(program: str, **env: str) -> str:
    """The output of a process of its own; FOURBIT_ variables are those given."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FOURBIT_", "PYTEST_"))}
    done = subprocess.run([sys.executable, "-c", program], env=clean | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- which instruction set, and none ----------------------------------------------------------------------

REPORT = """
import json, sys, warnings
BEFORE
import torch, fourbit
warnings.simplefilter("ignore", fourbit.BackendWarning)
info = {i.name: [i.state, i.reason] for i in fourbit.backends()}
w = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
packed, state = fourbit.quantize_4bit(w)
with fourbit.use_backend("reference"):
    same = torch.equal(fourbit.quantize_4bit(w)[0], packed)
explanation = fourbit.explain("linear_4bit", shape=(40, 96))
print(json.dumps([info, same, explanation.backend, str(explanation)]))
"""


def report(before: str = "", **env: str) -> tuple[dict[str, list[str]], bool, str, str]:
    return tuple(json.loads(python(REPORT.replace("BEFORE", before), **env)))


@pytest.mark.parametrize("isa", instruction_sets())
def test_forced_instruction_set(isa):
    info, same, backend, text = report(FOURBIT_CPU_ISA=isa)
    assert info["cpu"][0] == "ready" and same and backend == "cpu"
    assert f"{isa} kernels" in text


def test_the_best_is_taken_unless_forced(cpu):
    _, _, _, text = report()
    assert f"{instruction_sets()[0]} kernels" in text
    assert instruction_sets()[-1] == "scalar"


@pytest.mark.parametrize("isa", ("sse9", "neon", "avx2 "))
def test_forced_instruction_set_that_is_not_there(isa):
    """An error that lists those there are: not another instruction set in silence."""
    if isa.strip() in instruction_sets():
        assert report(FOURBIT_CPU_ISA=isa)[0]["cpu"][0] == "ready"
        return
    info, same, backend, text = report(FOURBIT_CPU_ISA=isa)
    state, reason = info["cpu"]
    assert state == "failed" and f"FOURBIT_CPU_ISA={isa.strip()!r}" in reason
    assert all(name in reason for name in instruction_sets())
    assert same and backend == "reference" and "FOURBIT_CPU_ISA" in text


def test_without_the_compiled_module():
    """As after an installation without a compiler: the reference serves, and everything says why."""
    info, same, backend, text = report('sys.modules["fourbit_cpu._native"] = None')
    assert info["cpu"][0] == "unavailable" and "compiler" in info["cpu"][1]
    assert same and backend == "reference"
    assert "cpu" in text and "compiler" in text


def test_command_line_without_the_compiled_module():
    program = """
import sys
sys.modules["fourbit_cpu._native"] = None
sys.argv = ["fourbit", "backends", "--json"]
from fourbit.cli import main
main()
"""
    (info,) = [b for b in json.loads(python(program))["backends"] if b["name"] == "cpu"]
    assert info["state"] == "unavailable" and "compiler" in info["reason"]


# ---- threads ----------------------------------------------------------------------------------------------


def calls(rows: int, n: int, k: int, dtype: torch.dtype) -> dict[str, tuple]:
    """A call of each op, on sizes that are split among threads."""
    weight, experts = make_weight(n, k, double_quant=True), make_weight(4, n // 4, k)
    args, nested = weight.args("cpu"), weight.nested_args("cpu")
    ends = torch.tensor([0, rows // 3, rows // 3, rows - 1])
    codes = torch.arange(n * k).to(torch.uint8)
    return {
        "quantize_4bit": (normal(n, k).to(dtype), args[2], 64, False),
        "quantize_4bit_scaled": (normal(n, k).to(dtype), args[2], 64, torch.rand(-(-n * k // 64))),
        "dequantize_4bit": (*args, [n, k], dtype, *nested),
        "linear_4bit": (normal(rows, k).to(dtype), *args, n, *nested, normal(n).to(dtype)),
        "linear_4bit_grad": (normal(rows, n).to(dtype), *args, k, *nested),
        "embedding_4bit": (torch.arange(n).flip(0), *args, n, k, dtype, *nested),
        "grouped_linear_4bit": (normal(rows, k).to(dtype), ends, *experts.args("cpu"), n // 4),
        "grouped_linear_4bit_grad": (normal(rows, n // 4).to(dtype), ends, *experts.args("cpu"), k),
        "quantize_blockwise": (normal(n * k).to(dtype), nested[1], 256),
        "dequantize_blockwise": (codes, torch.rand(-(-n * k // 256)), nested[1], 256, dtype),
    }


SHAPES = ((1, 1024, 2048), (5, 1020, 1100), (70, 516, 1030))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_with_1_2_3_threads(restore_threads, shape, dtype):
    everything = calls(*shape, dtype)
    assert set(everything) == set(OPS)
    for op, args in everything.items():
        run, want = getattr(torch.ops.fourbit, op), None
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got = tree_leaves(run(*args))
            for actual, expected in zip(got, want or got, strict=True):
                assert_same_bits(actual, expected, f"{op} with {threads} threads")
            want = want or got


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_python_threads_at_once(dtype):
    everything = list(calls(5, 1020, 1100, dtype).items())
    want = [tree_leaves(getattr(torch.ops.fourbit, op)(*args)) for op, args in everything]

    def work(index: int) -> list[torch.Tensor]:
        op, args = everything[index % len(everything)]
        return tree_leaves(getattr(torch.ops.fourbit, op)(*args))

    with ThreadPoolExecutor(4) as pool:
        for index, got in enumerate(pool.map(work, range(5 * len(everything)))):
            for actual, expected in zip(got, want[index % len(everything)], strict=True):
                assert_same_bits(actual, expected, f"{everything[index % len(everything)][0]} beside others")


def test_other_python_threads_run_meanwhile(restore_threads):
    """The GIL is given up: this thread makes progress in the middle of another's call."""
    torch.set_num_threads(1)
    weight = make_weight(2048, 2048)
    x = normal(512, 2048)
    span: list[float] = []

    def work() -> None:
        begin = time.perf_counter()
        torch.ops.fourbit.linear_4bit(x, *weight.args("cpu"), 2048)
        span.extend((begin, time.perf_counter()))

    thread, ticks = threading.Thread(target=work), []
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.0005)
    thread.join()
    begin, end = span
    margin = (end - begin) / 10
    assert any(begin + margin < tick < end - margin for tick in ticks)


def test_after_fork(cpu):
    """A child of a process that has used its threads computes, as torch itself can, on one thread."""
    program = """
import os, sys, torch, fourbit
x, w = torch.randn(40, 1088), torch.randn(1030, 1088)
with fourbit.use_backend("cpu"):
    torch.set_num_threads(2)
    packed, state = fourbit.quantize_4bit(w)
    want = fourbit.linear_4bit(x, packed, state)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        again = fourbit.quantize_4bit(w)[0], fourbit.linear_4bit(x, packed, state)
        os._exit(0 if torch.equal(again[0], packed) and torch.equal(again[1], want) else 7)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, status
    assert torch.equal(fourbit.linear_4bit(x, packed, state), want)
"""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    python(program)


# ---- precision and autograd -------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", (False, True), ids=("plain", "double"))
@pytest.mark.parametrize("shape", ((512, 4096), (300, 11008), (257, 1030), (96, 33)), ids=str)
def test_float32_is_float32_arithmetic(shape, double_quant):
    """Relative error of at most 3e-7 against the float64 product: of the whole result, and of each element."""
    n, k = shape
    weight = make_weight(n, k, double_quant=double_quant)
    args, nested = weight.args("cpu"), weight.nested_args("cpu")
    dense = weight.dense().double()
    for rows in (1, 2, 4, 5, 16, 40):
        x, grad = normal(rows, k, seed=rows), normal(rows, n, seed=rows)
        for result, left, right in (
            (torch.ops.fourbit.linear_4bit(x, *args, n, *nested), x.double(), dense.T),
            (torch.ops.fourbit.linear_4bit_grad(grad, *args, k, *nested), grad.double(), dense),
        ):
            exact = left @ right
            error = result.double() - exact
            assert float(error.norm() / exact.norm()) <= 3e-7
            assert float((error.abs() / (left.abs() @ right.abs())).max()) <= 3e-7


def test_grad_modes():
    """The same bits under every mode, and a gradient where one is asked for."""
    weight = make_weight(50, 128)
    state, x = weight.state("cpu"), normal(6, 128)
    want = fourbit.linear_4bit(x, weight.packed, state)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert_same_bits(fourbit.linear_4bit(x, weight.packed, state), want, mode.__name__)
            assert_same_bits(fourbit.linear_4bit(x.clone(), weight.packed, state), want, mode.__name__)
    leaf = x.clone().requires_grad_()
    out = fourbit.linear_4bit(leaf, weight.packed, state)
    assert_same_bits(out, want, "with a gradient recorded")
    upstream = normal(6, 50, seed=3)
    out.backward(upstream)
    exact = upstream.double() @ weight.dense().double()
    assert float((leaf.grad.double() - exact).norm() / exact.norm()) <= 3e-7
