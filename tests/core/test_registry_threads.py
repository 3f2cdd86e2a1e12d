"""Threads and interrupts: what is resolved for one state of the registry is never found in another."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading

import pytest
import torch

import fourbit
from fourbit import dispatch, isolation, plugins, registry
from fourbit.backend import Support
from tests.core.test_registry import W, info_of, make, no_trace_left  # noqa: F401

KEY = (torch.device("cpu"), torch.float32, 64, False)


@pytest.fixture
def switching():
    """Threads change places as often as Python lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def waits(asked: threading.Event, answer: threading.Event):
    """A `supports` that says yes once `answer` is set; `asked` tells that it has been called."""

    def supports(self, query):
        asked.set()
        assert answer.wait(60)
        return Support(True)

    return supports


@contextlib.contextmanager
def registered():
    registry.register(make(name="better", priority=99))
    yield


@contextlib.contextmanager
def unregistered():
    registry.unregister("fake")
    yield


CHANGES = {
    "use_backend": lambda: fourbit.use_backend("reference"),
    "register": registered,
    "unregister": unregistered,
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_asked_before_a_change_is_not_found_after_it(what):
    """A thread asks a backend, which takes its time; meanwhile the registry changes, and does not wait for it."""
    asked, answer = threading.Event(), threading.Event()
    registry.register(make(priority=90, supports=waits(asked, answer)))
    ran: list[object] = []
    thread = threading.Thread(target=lambda: ran.append(dispatch.miss("quantize_4bit", KEY)))
    thread.start()
    assert asked.wait(60)
    with CHANGES[what]():
        answer.set()
        thread.join(60)
        assert ran and not registry.state.tables["quantize_4bit"] and not dispatch.resolutions()
        fourbit.quantize_4bit(W, blocksize=64)
        (found,) = dispatch.resolutions()
        assert found.entry.name != "fake"


def test_a_default_blocksize_that_was_asked_before_a_change():
    asked, answer = threading.Event(), threading.Event()

    def default_blocksize(self, device):
        if threading.current_thread() is not threading.main_thread():
            asked.set()
            assert answer.wait(60)
        return 256

    registry.register(make(priority=90, default_blocksize=default_blocksize))
    thread = threading.Thread(target=dispatch.default_blocksize, args=(torch.device("cpu"),))
    thread.start()
    assert asked.wait(60)
    with fourbit.use_backend("reference"):
        answer.set()
        thread.join(60)
        assert fourbit.quantize_4bit(W)[1].blocksize == 64
    assert fourbit.quantize_4bit(W)[1].blocksize == 256


def test_use_backend_among_threads_that_miss_all_the_time(switching):
    """In the block every table holds the chosen backend's methods alone, whatever other threads were about to store."""
    fast = make(name="fast", priority=90)
    registry.register(fast)
    stop = threading.Event()
    errors: list[BaseException] = []

    def work():
        try:
            while not stop.is_set():
                fourbit.quantize_4bit(W, blocksize=64)
                dispatch.clear_tables()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(150):
            with fourbit.use_backend("reference") as chosen:
                for _ in range(3):
                    fourbit.quantize_4bit(W, blocksize=64)
                    now = registry.state
                    methods = list(now.tables["quantize_4bit"].values())
                    assert all(method.__self__ is chosen for method in methods)
                    assert {found.entry.name for found in now.resolutions.values()} <= {"reference"}
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors and not registry.state.forced


def test_a_change_waits_for_another():
    """Else the later of two that began with the same state would undo the earlier one."""
    inside, done = threading.Event(), threading.Event()

    def slowly(now):
        inside.set()
        done.wait(0.3)  # the other must not get that far
        return {"infos": (*now.infos, registry.BackendInfo("slow", "failed", "of this test"))}

    def other():
        assert inside.wait(60)
        registry.register(make(name="quick"))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    registry.change(slowly)
    thread.join(60)
    assert {"slow", "quick"} <= {info.name for info in registry.state.infos}
    assert registry.state.entry("quick") is not None


def test_many_threads_change_the_registry_at_once(switching):
    """No change is lost: all blocks end, every backend that was registered is there, and none that was taken out."""
    errors: list[BaseException] = []

    def work(number):
        try:
            for turn in range(20):
                registry.register(make(name=f"t{number}-{turn}"))
                with fourbit.use_backend(f"t{number}-{turn}"):
                    dispatch.clear_tables()
                if turn % 2:
                    registry.unregister(f"t{number}-{turn}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and not registry.state.forced
    names = sorted(entry.name for entry in registry.state.entries if entry.name.startswith("t"))
    assert names == sorted(f"t{number}-{turn}" for number in range(4) for turn in range(0, 20, 2))
    assert names == sorted(info.name for info in fourbit.backends() if info.name.startswith("t"))


# ---- interrupts ---------------------------------------------------------------------------------------------


class Interrupt:
    """Raises KeyboardInterrupt at the n-th place of the registry where Python would handle a signal.

    Those are the entry of a function and the end of a call of a C function, as sys.setprofile sees them.
    """

    files = [part.__file__ for part in (registry, plugins, dispatch, isolation, contextlib)]

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, frame, event, arg):
        if event in ("call", "c_return") and frame.f_code.co_filename in self.files:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def at_every_place(action, check) -> int:
    """Runs `action` with an interrupt at each of its places, one at a time, and `check` after each; how many."""
    for n in range(1, 10_000):
        trap = Interrupt(n)
        interrupted = False
        try:
            sys.setprofile(trap)
            action()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.setprofile(None)
        gc.collect(0)
        check()
        if not interrupted and trap.left > 0:
            return n - 1
    raise AssertionError("it does not end")


@pytest.mark.skipif(
    sys.version_info < (3, 11),
    reason="where sys.setprofile raises as a generator is resumed, 3.10 skips its finally; no signal is handled there",
)
def test_use_backend_interrupted_anywhere():
    usual = dispatch.resolve(dispatch.OpQuery("quantize_4bit", *KEY)).entry.name

    def action():
        with fourbit.use_backend("reference"):
            fourbit.quantize_4bit(W, blocksize=64)
            with fourbit.use_backend("reference"):
                pass

    def check():
        assert not registry.state.forced
        assert dispatch.resolve(dispatch.OpQuery("quantize_4bit", *KEY)).entry.name == usual

    assert at_every_place(action, check) > 50


def test_register_and_unregister_interrupted_anywhere():
    def action():
        registry.register(make(priority=90))
        registry.unregister("fake")

    def check():
        """Ready, listed and asked, or none of them."""
        entries = [entry.name for entry in registry.state.entries]
        listed = [info.name for info in registry.state.infos if info.state == "ready"]
        assert sorted(entries) == sorted(listed) and entries.count("fake") <= 1
        dispatch.clear_tables()
        fourbit.quantize_4bit(W, blocksize=64)
        assert ("fake" in entries) == (dispatch.resolutions()[0].entry.name == "fake")
        if "fake" in entries:
            registry.unregister("fake")

    assert at_every_place(action, check) > 50


def test_a_miss_interrupted_anywhere():
    registry.register(make(priority=90))

    def action():
        dispatch.clear_tables()
        dispatch.miss("quantize_4bit", KEY)

    def check():
        assert {found.entry.name for found in dispatch.resolutions()} <= {"fake"}
        fourbit.quantize_4bit(W, blocksize=64)
        assert info_of("fake").state == "ready" and registry.state.tables["quantize_4bit"][KEY].__self__.name == "fake"

    assert at_every_place(action, check) > 10
