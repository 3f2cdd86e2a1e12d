"""Plugins as they are installed, in processes of their own: broken ones break nothing but themselves."""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support import skip_or_fail

GOOD = """
from fourbit.hookspecs import hookimpl
from fourbit.reference import ReferenceBackend

class Good(ReferenceBackend):
    name, priority = NAME, 10

@hookimpl
def fourbit_register_backends(register):
    register(Good())
"""

REPORT = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, fourbit
    for _ in range(2):
        packed, state = fourbit.quantize_4bit(torch.randn(8, 64), double_quant=True)
        y = fourbit.linear_4bit(torch.randn(2, 64), packed, state)
    infos = [[i.name, i.state, i.reason, i.source, i.traceback] for i in fourbit.backends()]
from fourbit import dispatch
used = sorted({r.backend.name for r in dispatch.resolutions()})
messages = [[w.category.__name__, str(w.message)] for w in caught]
print(json.dumps({"infos": infos, "used": used, "warnings": messages}))
"""


def install_into(folder: Path, **plugins: str) -> dict[str, str]:
    """Make installed distributions, one a plugin; returns the environment of a process that sees them."""
    for name, source in plugins.items():
        (folder / f"plugin_{name}.py").write_text(source.replace("NAME", repr(name)))
        info = folder / f"dist_{name}-3.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dist-{name}\nVersion: 3.2\n")
        (info / "entry_points.txt").write_text(f"[fourbit.backends]\n{name} = plugin_{name}\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FOURBIT_")}
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return clean | {"PYTHONPATH": path}


@pytest.fixture
def install(tmp_path):
    """`install(plugin=source)`, for one test."""
    return functools.partial(install_into, tmp_path)


def run(
    program: str, env: dict[str, str], *options: str, arguments: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", program, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@dataclass
class Report:
    """What a process with plugins saw: its infos by source, warnings, and the backends that ran its ops."""

    infos: list[list[str]]
    warnings: list[list[str]]
    used: list[str]

    def of(self, distribution: str) -> list[str]:
        """(name, state, reason, source, traceback) of the only backend from a distribution."""
        (info,) = [info for info in self.infos if info[3].split()[0] == distribution]
        return info


def report(env: dict[str, str]) -> Report:
    return Report(**json.loads(run(REPORT, env).stdout))


BROKEN = {
    "import error": ("import a_driver_that_is_not_installed\n", "failed", "ModuleNotFoundError"),
    "syntax error": ("def broken(:\n", "failed", "SyntaxError"),
    "exit at import": ("import sys\nsys.exit('this machine has no chip')\n", "failed", "SystemExit: this machine"),
    "raising hook": (
        "from fourbit.hookspecs import hookimpl\n@hookimpl\ndef fourbit_register_backends(register):\n"
        "    raise RuntimeError('the driver is too old')\n",
        "failed",
        "RuntimeError: the driver is too old",
    ),
    "hook that registers, then raises": (
        GOOD + "    raise RuntimeError('afterwards')\n",
        "failed",
        "RuntimeError: afterwards",
    ),
    "hook with other arguments": (
        "from fourbit.hookspecs import hookimpl\n@hookimpl\ndef fourbit_register_backends(registry):\n    pass\n",
        "failed",
        "PluginValidationError",
    ),
    "hook that does not exist": (
        "from fourbit.hookspecs import hookimpl\n@hookimpl\ndef fourbit_register_backend(register):\n    pass\n",
        "failed",
        "PluginValidationError",
    ),
    "wrong API version": (
        GOOD.replace("name, priority", "api_version = 9\n    name, priority"),
        "rejected",
        "version 9",
    ),
    "no Backend": (GOOD.replace("register(Good())", "register(NAME)"), "rejected", "not an instance of"),
    "bad name": (GOOD.replace("= NAME", "= 'No Good'"), "rejected", "'No Good'"),
    "unavailable() raises": (
        GOOD.replace("@hookimpl", "    def unavailable(self): return 1 / 0\n\n@hookimpl"),
        "failed",
        "ZeroDivisionError",
    ),
    "a Rust panic at import": (  # pyo3's PanicException derives from BaseException
        "class PanicException(BaseException): pass\nraise PanicException('called `unwrap` on a `None` value')\n",
        "failed",
        "PanicException: called `unwrap`",
    ),
    "GeneratorExit in a hook": (
        GOOD + "    raise GeneratorExit('closed')\n",
        "failed",
        "GeneratorExit: closed",
    ),
    "an exception without a text": (
        "class Mute(Exception):\n    def __str__(self): raise RuntimeError\nraise Mute\n",
        "failed",
        "Mute",
    ),
    "NaN as priority": (GOOD.replace("NAME, 10", "NAME, float('nan')"), "rejected", "its priority nan is not a number"),
    "a codebook that only looks like one": (
        "from fourbit.codebooks import Codebook\nfrom fourbit.hookspecs import hookimpl\n"
        "class Look(Codebook):\n    def __ne__(self, other): return False\n@hookimpl\n"
        "def fourbit_register_codebooks(register):\n    register(Look('nf4', tuple(i / 15 for i in range(16))))\n",
        "failed",
        "want a fourbit.codebooks.Codebook, got Look",
    ),
    "bad codebook": (
        "from fourbit.hookspecs import hookimpl\nfrom fourbit.codebooks import Codebook\n@hookimpl\n"
        "def fourbit_register_codebooks(register):\n    register(Codebook('five', (1.0,) * 5))\n",
        "failed",
        "want 16 values, got 5",
    ),
}


@pytest.fixture(scope="module")
def all_broken(tmp_path_factory) -> Report:
    """One process with every broken plugin at once, and a good one that is loaded after them all."""
    plugins = {f"bad{index:02}": source for index, (source, _, _) in enumerate(BROKEN.values())}
    return report(install_into(tmp_path_factory.mktemp("broken"), **plugins, zgood=GOOD))


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_plugin(all_broken, fault):
    """One warning names the plugin and the reason, and backends() keeps the state and the traceback."""
    _, state, reason = BROKEN[fault]
    distribution = f"dist-bad{list(BROKEN).index(fault):02}"
    _, found, why, source, trace = all_broken.of(distribution)
    assert found == state and reason in why and source.startswith(f"{distribution} 3.2 (plugin_bad")
    if state == "failed":
        assert "Traceback (most recent call last)" in trace and reason.split(":")[0] in trace
    ((category, message),) = [warning for warning in all_broken.warnings if distribution in warning[1]]
    assert category == "BackendWarning" and reason in message
    if fault == "wrong API version":
        assert "version 9" in message and "this fourbit has version 2" in message


def test_nothing_else_is_broken(all_broken):
    """Ops work, on the plugin that was loaded last; the reference is there."""
    assert all_broken.used == ["zgood"]
    assert [info[1] for info in all_broken.infos if info[0] in ("reference", "zgood")] == ["ready", "ready"]
    assert len(all_broken.warnings) == len(BROKEN)


def test_duplicate_name(install):
    other = GOOD.replace("= NAME", "= 'alpha'")
    result = report(install(alpha=GOOD, beta=other))
    assert result.used == ["alpha"]
    assert result.of("dist-alpha")[:2] == ["alpha", "ready"] and result.of("dist-beta")[:2] == ["alpha", "rejected"]
    (warning,) = result.warnings
    assert "'alpha' is taken already, by dist-alpha 3.2" in warning[1]


def test_warnings_as_errors_still_load_the_plugins_after_it(install):
    """Under -W error the first use raises the warning; every plugin is loaded all the same."""
    env = install(bad="import a_driver_that_is_not_installed\n", zgood=GOOD)
    program = """
import torch, fourbit
try:
    fourbit.quantize_4bit(torch.randn(64))
    raise SystemExit("no warning")
except fourbit.BackendWarning as warning:
    assert "a_driver_that_is_not_installed" in str(warning)
fourbit.quantize_4bit(torch.randn(64))
assert {i.name: i.state for i in fourbit.backends()} == {"bad": "failed", "zgood": "ready", "reference": "ready"} | {
    i.name: i.state for i in fourbit.backends() if i.source.startswith("fourbit ")}
"""
    run(program, env, "-W", "error::RuntimeWarning")


INTERRUPTED = """
import json, sys, torch, fourbit
from fourbit import dispatch, registry, codebooks
fourbit_folder = registry.__file__.rsplit("/", 1)[0]
w = torch.randn(64)
import importlib.metadata
found = importlib.metadata.entry_points(group=registry.ENTRY_POINT_GROUP)  # once: most of a load's time
importlib.metadata.entry_points = lambda group: found

def ours(frame):
    return frame.f_code.co_filename.startswith((fourbit_folder + "/registry.py", fourbit_folder + "/isolation.py",
        fourbit_folder + "/dispatch.py", fourbit_folder + "/codebooks.py")) or "plugin_" in frame.f_code.co_filename

class Interrupt:
    '''Raises at the n-th place where Python would handle a signal: entry of a function, end of a call.'''
    def __init__(self, n):
        self.left = n
    def __call__(self, frame, event, arg):
        if event in ("call", "c_return") and ours(frame):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

def reset():
    registry.state, registry._given = registry.State(), set()
    for name in [name for name in sys.modules if name.startswith("plugin_")]:
        del sys.modules[name]

def whole():
    return [(i.name, i.state) for i in fourbit.backends()]

import warnings; warnings.simplefilter("ignore")
fourbit.quantize_4bit(w)
expected = whole()
assert ("alpha", "ready") in expected and ("zgood", "ready") in expected and ("bad", "failed") in expected, expected
n, interrupted, stride = 0, 0, int(sys.argv[1])
while True:
    n += stride
    reset()
    trap = Interrupt(n)
    try:
        sys.setprofile(trap)
        fourbit.quantize_4bit(w)
        done = True
    except KeyboardInterrupt:
        done = False
    finally:
        sys.setprofile(None)
    if done and trap.left > 0:
        break
    interrupted += not done
    fourbit.quantize_4bit(w)
    assert whole() == expected, (n, whole())
    assert dispatch.resolutions()[0].entry.name == "alpha", n
    assert codebooks.get("even4")
print(json.dumps(interrupted))
"""


@pytest.mark.parametrize("stride", (13, pytest.param(1, marks=pytest.mark.long)))
def test_an_interrupt_anywhere_leaves_the_next_call_whole(install, stride):
    """KeyboardInterrupt at every place of the first call where Python would handle one: it passes through, and the
    next call has every plugin, none twice. (In the place of a real signal, which hits a place of its own choice.)"""
    codebook = """
from fourbit.codebooks import Codebook
@hookimpl
def fourbit_register_codebooks(register):
    register(Codebook("even4", tuple((i - 7.5) / 7.5 for i in range(16))))
"""
    only = {"FOURBIT_BACKENDS": "alpha,bad,zgood"}  # the fewer places, the faster
    env = only | install(alpha=GOOD + codebook, bad=GOOD + "    raise RuntimeError('afterwards')\n", zgood=GOOD)
    assert json.loads(run(INTERRUPTED, env, arguments=(str(stride),)).stdout) > 500 // stride


def test_control_c_during_the_first_call(install):
    """A real one, while a plugin is being imported; the next call loads them all."""
    slow = (
        """
import os, signal, time
if not os.environ.get("SENT"):
    os.environ["SENT"] = "1"
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""
        + GOOD
    )
    program = """
import signal, torch, fourbit
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    fourbit.quantize_4bit(torch.randn(64))
    raise SystemExit("not interrupted")
except KeyboardInterrupt:
    pass
fourbit.quantize_4bit(torch.randn(64))
states = {i.name: i.state for i in fourbit.backends()}
assert {name: states[name] for name in ("alpha", "slow", "zgood", "reference")} == dict.fromkeys(
    ("alpha", "slow", "zgood", "reference"), "ready"), states
assert len(states) == len(fourbit.backends())
"""
    run(program, install(alpha=GOOD, slow=slow, zgood=GOOD))


def test_plugin_that_uses_fourbit_while_it_loads(install):
    early = "import torch, fourbit\nfourbit.backends()\nPACKED = fourbit.quantize_4bit(torch.randn(64))\n" + GOOD
    result = report(install(early=early))
    assert result.of("dist-early")[1] == "ready" and result.used == ["early"] and not result.warnings


def test_plugin_adds_a_codebook(install):
    source = """
from fourbit.codebooks import Codebook
from fourbit.hookspecs import hookimpl

@hookimpl
def fourbit_register_codebooks(register):
    register(Codebook("even4", tuple((i - 7.5) / 7.5 for i in range(16))))
"""
    program = """
import torch, fourbit
packed, state = fourbit.quantize_4bit(torch.linspace(-1, 1, 64), quant_type="even4")
assert float((fourbit.dequantize_4bit(packed, state) - torch.linspace(-1, 1, 64)).abs().max()) < 0.07
assert fourbit.QuantState.from_state_dict(state.to_state_dict()).quant_type == "even4"
"""
    run(program, install(even=source))


# ---- environment variables ------------------------------------------------------------------------------


def test_backends_variable_restricts_and_orders(install):
    env = install(alpha=GOOD, beta=GOOD, bad="raise RuntimeError\n")
    result = report(env | {"FOURBIT_BACKENDS": "reference, beta"})
    assert [info[0] for info in result.infos][:2] == ["reference", "beta"] and result.used == ["reference"]
    assert result.of("dist-alpha")[1:3] == ["disabled", "not in FOURBIT_BACKENDS=reference, beta"]
    assert result.of("dist-bad")[1] == "disabled" and not result.warnings
    assert report(env | {"FOURBIT_BACKENDS": "beta,alpha"}).used == ["beta"]


def test_backends_variable_with_an_unknown_name(install):
    result = report(install() | {"FOURBIT_BACKENDS": "nonesuch,reference"})
    assert result.used == ["reference"]
    assert result.warnings == [["BackendWarning", "FOURBIT_BACKENDS names 'nonesuch', which is not installed"]]


def test_backends_variable_of_rubbish_is_an_error_each_time(install):
    """And one that says what is wrong: the warning comes only once."""
    program = """
import warnings, torch, fourbit
warnings.simplefilter("ignore", fourbit.BackendWarning)
for _ in range(3):
    try:
        fourbit.quantize_4bit(torch.randn(64))
    except fourbit.NoBackendError as error:
        assert "reference: disabled (not in FOURBIT_BACKENDS=!rubbish/)" in str(error), error
        assert "!rubbish/: failed (FOURBIT_BACKENDS names it, and it is not installed)" in str(error), error
    else:
        raise SystemExit("it ran")
assert {i.state for i in fourbit.backends()} == {"failed", "disabled"}
assert fourbit.explain("linear_4bit", blocksize=64).backend is None
"""
    run(program, install() | {"FOURBIT_BACKENDS": "!rubbish/"})


def test_cpu_isa_of_rubbish_is_a_failure_that_stays(install):
    """The cpu backend says so, in a warning and in the list; the rest of the process is whole."""
    if find_spec("fourbit_cpu._native") is None:
        skip_or_fail("the compiled kernels are not in this installation")
    result = report(install() | {"FOURBIT_CPU_ISA": "sse9"})
    (cpu,) = [info for info in result.infos if info[0] == "cpu"]
    assert cpu[1] == "failed" and "FOURBIT_CPU_ISA='sse9': this machine and this build have" in cpu[2]
    assert "ValueError" in cpu[4] and result.used == ["reference"]
    ((category, message),) = result.warnings
    assert category == "BackendWarning" and "FOURBIT_CPU_ISA='sse9'" in message


def test_backends_variable_that_leaves_none(install):
    program = """
import torch, fourbit
try:
    fourbit.quantize_4bit(torch.randn(64), blocksize=64)
except fourbit.NoBackendError as error:
    assert "reference: disabled (not in FOURBIT_BACKENDS=picky)" in str(error), error
else:
    raise SystemExit("it ran")
"""
    picky = GOOD.replace("@hookimpl", "    def unavailable(self): return 'no chip'\n\n@hookimpl")
    run(program, install(picky=picky) | {"FOURBIT_BACKENDS": "picky"})


def test_trace_variable(install):
    env = install(alpha=GOOD) | {"FOURBIT_TRACE": "1"}
    program = "import torch, fourbit\nfor _ in range(3): fourbit.quantize_4bit(torch.randn(64), blocksize=64)"
    lines = [line for line in run(program, env).stderr.splitlines() if line.startswith("fourbit:")]
    assert lines == ["fourbit: quantize_4bit on cpu (float32, blocksize 64) -> alpha"]


# ---- the cost of importing --------------------------------------------------------------------------------


def test_import_loads_no_backend_and_no_plugin_machinery(install):
    env = install(loud="raise RuntimeError('loaded')\n")
    program = """
import sys, torch
before = set(sys.modules)
import fourbit
new = set(sys.modules) - before
bad = sorted(m for m in new if m.startswith(("pluggy", "fourbit_", "fourbit.reference",
    "plugin_", "fourbit.testing", "fourbit.nn", "fourbit.cli", "fourbit.checkpoint", "transformers", "safetensors",
    "typer", "rich", "numpy", "torch._dynamo", "torch._inductor")))
assert not bad, bad
from fourbit import registry
assert not registry.state.loaded and not registry.state.entries
assert not torch.cuda.is_initialized()
"""
    run(program, env, "-W", "error::RuntimeWarning")


def test_import_is_light(install):
    """A sanity bound over torch's own import; asv tracks the real figure, of some tens of milliseconds."""
    program = "import time, torch; t = time.perf_counter(); import fourbit; print(time.perf_counter() - t)"
    env = install()
    times = []
    started = time.monotonic()
    while len(times) < 3 and time.monotonic() - started < 60:
        times.append(float(run(program, env).stdout))
    assert statistics.median(times) < 0.5, times
