"""The registry in this process: registering, resolving, and the dispatch tables."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

import fourbit
from fourbit import dispatch, registry
from fourbit.backend import OPS, Backend, OpQuery, Support
from fourbit.reference import ReferenceBackend

W = torch.randn(8, 64)
QUERY = OpQuery("quantize_4bit", torch.device("cpu"), torch.float32, 64)


class Fake(ReferenceBackend):
    """Works; below the reference, so that nothing uses it by chance."""

    name = "fake"
    priority = -1


@pytest.fixture(autouse=True)
def no_trace_left(monkeypatch):
    """The registry as it was, whatever a test registers."""
    registry.load_plugins()
    before = registry.state
    monkeypatch.setattr(registry, "_given", set())
    yield
    assert not registry.state.forced
    registry.change(lambda now: {"entries": before.entries, "infos": before.infos})


def info_of(name: str) -> registry.BackendInfo:
    (info,) = [info for info in fourbit.backends() if info.name == name and info.state != "rejected"]
    return info


def make(**attributes: object) -> Backend:
    return type("Made", (Fake,), attributes)()


def raising(error: BaseException):
    def method(self, *args: object) -> None:
        raise error

    return method


# ---- registering --------------------------------------------------------------------------------------


def test_register_and_unregister():
    registry.register(Fake())
    info = info_of("fake")
    assert (info.state, info.device_types, info.default_blocksize) == ("ready", ("*",), 64)
    assert info.reason == "serves any device" and info.source == "registered by the program"
    assert registry.get_backend("fake").name == "fake"
    registry.unregister("fake")
    with pytest.raises(registry.NoBackendError, match="'fake' is not ready"):
        registry.get_backend("fake")


def test_register_takes_a_class_too():
    registry.register(Fake)
    assert isinstance(registry.get_backend("fake"), Fake)


@pytest.mark.parametrize(
    ("backend", "reason"),
    (
        (make(api_version=7), "API version 7, and this fourbit has version 2"),
        (
            make(api_version=1),
            "version 1, and this fourbit has version 2; since version 2 an op takes its weight as one",
        ),
        (make(api_version="1"), "API version 1, and"),
        (make(name="Bad Name"), "its name 'Bad Name' is not a lower-case word"),
        (make(name=None), "its name None"),
        (make(device_types=["cpu"]), "not a tuple of torch device types"),
        (make(device_types=()), "not a tuple of torch device types"),
        (make(device_types="cpu"), "not a tuple of torch device types"),
        (make(name="reference"), "the name 'reference' is taken already, by fourbit"),
        (object(), "not an instance of fourbit.backend.Backend but of object"),
        (None, "but of NoneType"),
        ("reference", "but of str"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_left_out(backend, reason):
    before = registry.state.entries
    with pytest.warns(fourbit.BackendWarning) as caught:
        registry.register(backend)
    assert len(caught) == 1 and reason in str(caught[0].message)
    assert registry.state.entries == before
    (info,) = [info for info in fourbit.backends() if info.state == "rejected"]
    assert reason in info.reason
    assert info_of("reference").state == "ready"  # a bad one of the same name hides nothing
    fourbit.quantize_4bit(W)


def test_duplicate_names_the_source_of_both():
    registry.register(Fake(), source="first 1.0")
    with pytest.warns(fourbit.BackendWarning, match="from second 2.0.*taken already, by first 1.0"):
        registry.register(Fake(), source="second 2.0")
    states = {info.source: info.state for info in fourbit.backends() if info.name == "fake"}
    assert states == {"first 1.0": "ready", "second 2.0": "rejected"}


def test_unavailable_is_no_fault():
    """A reason in the list, and no warning: most machines lack most devices."""
    registry.register(make(unavailable=lambda self: "no chip is plugged in"))
    info = info_of("fake")
    assert (info.state, info.reason, info.default_blocksize) == ("unavailable", "no chip is plugged in", None)
    with pytest.raises(registry.NoBackendError, match="fake: unavailable .no chip is plugged in"):
        registry.get_backend("fake")


@pytest.mark.parametrize("method", ("unavailable", "default_blocksize"))
def test_a_method_that_raises_while_it_is_registered(method):
    with pytest.warns(fourbit.BackendWarning, match="'fake' from .* RuntimeError: broken driver"):
        registry.register(make(**{method: raising(RuntimeError("broken driver"))}))
    info = info_of("fake")
    assert info.state == "failed" and "RuntimeError: broken driver" in info.traceback


# ---- resolving ----------------------------------------------------------------------------------------


def test_highest_priority_that_supports_it_wins():
    def declines_nested(self: Backend, query: OpQuery) -> Support:
        return Support.no("no nested scales here") if query.nested else Support(True)

    registry.register(make(name="high", priority=90, supports=declines_nested))
    registry.register(make(name="low", priority=10))
    order = [info.name for info in fourbit.backends()]
    assert order.index("high") < order.index("low") < order.index("reference")
    assert dispatch.resolve(QUERY).backend.name == "high"
    nested = OpQuery("dequantize_4bit", torch.device("cpu"), torch.float32, 64, True)
    found = dispatch.resolve(nested)
    assert found.backend.name != "high" and ("high", "no nested scales here") in found.rejected


def test_supports_that_raises_counts_as_no_and_warns_once():
    registry.register(make(priority=90, supports=raising(KeyError("dtype"))))
    with pytest.warns(fourbit.BackendWarning, match="'fake': supports.. raised KeyError") as caught:
        for _ in range(3):
            dispatch.clear_tables()
            packed, state = fourbit.quantize_4bit(W)
            fourbit.dequantize_4bit(packed, state)
    assert len(caught) == 1
    rejected = dict(dispatch.resolve(QUERY).rejected)
    assert "supports() raised KeyError" in rejected["fake"]


@pytest.mark.parametrize("answer", (None, True, "no", 0))
def test_supports_that_returns_no_support(answer):
    registry.register(make(priority=90, supports=lambda self, query: answer))
    found = dispatch.resolve(QUERY)
    assert found.backend.name != "fake" and "not a Support" in dict(found.rejected)["fake"]


def test_composed_ops_need_dequantize():
    """A backend that cannot dequantize has no linear_4bit either, though its `supports` says yes to all."""

    class QuantizesOnly(Backend):
        api_version, name, device_types, priority = 2, "half", ("cpu",), 90
        quantize_4bit = ReferenceBackend.quantize_4bit

    registry.register(QuantizesOnly())
    answers = {op: dispatch.ask(registry.get_backend("half"), OpQuery(op, *QUERY_REST)) for op in OPS}
    assert {op for op, answer in answers.items() if answer} == {
        "quantize_4bit", "quantize_4bit_scaled", "quantize_blockwise", "dequantize_blockwise",
    }  # fmt: skip
    assert answers["dequantize_4bit"].reason == "does not implement it"
    assert "composed of dequantize_4bit" in answers["linear_4bit"].reason
    packed, state = fourbit.quantize_4bit(W)
    fourbit.linear_4bit(torch.randn(2, 64), packed, state)
    assert {r.query.op: r.backend.name for r in dispatch.resolutions()}["linear_4bit"] != "half"


def table_of(op: str) -> dict:
    return registry.state.tables[op]


QUERY_REST = (torch.device("cpu"), torch.float32, 64)


def test_table_is_keyed_filled_on_a_miss_and_cleared():
    dispatch.clear_tables()
    assert not table_of("quantize_4bit")
    fourbit.quantize_4bit(W, blocksize=64)
    fourbit.quantize_4bit(W, blocksize=128)
    fourbit.quantize_4bit(W.half(), blocksize=64)
    device = torch.device("cpu")
    table = table_of("quantize_4bit")
    assert set(table) == {
        (device, torch.float32, 64, False),
        (device, torch.float32, 128, False),
        (device, torch.float16, 64, False),
    }
    assert all(callable(method) for method in table.values())
    registry.register(Fake())
    assert not table_of("quantize_4bit") and not dispatch.resolutions()
    fourbit.quantize_4bit(W)
    registry.unregister("fake")
    assert not table_of("quantize_4bit")


def test_neither_hooks_nor_supports_are_called_per_op(monkeypatch):
    asked: list[OpQuery] = []

    def count(self: Backend, query: OpQuery) -> Support:
        asked.append(query)
        return Support(True)

    registry.register(make(priority=90, supports=count))
    packed, state = fourbit.quantize_4bit(W, blocksize=64)
    x = torch.randn(2, 64)
    fourbit.linear_4bit(x, packed, state)
    before = len(asked)
    import pluggy

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a hook was called, or a plugin manager made, for an op")

    monkeypatch.setattr(pluggy.PluginManager, "__init__", forbidden)
    monkeypatch.setattr(registry, "_load_plugin", forbidden)
    monkeypatch.setattr(registry, "_entry_points", forbidden)
    for _ in range(20):
        fourbit.quantize_4bit(W, blocksize=64)
        fourbit.linear_4bit(x, packed, state)
    assert len(asked) == before


def test_no_backend_error_says_all_there_is_to_say():
    registry.register(make(name="picky", supports=lambda self, query: Support.no("it is Monday")))
    with fourbit.use_backend("picky"), pytest.raises(fourbit.NoBackendError) as error:
        fourbit.quantize_4bit(W.half(), blocksize=128)
    text = str(error.value)
    for part in ("quantize_4bit on cpu (float16, blocksize 128)", "picky: it is Monday", "use_backend('picky')"):
        assert part in text
    assert "reference: ready" in text


def test_trace_prints_each_resolution_once(monkeypatch, capsys):
    monkeypatch.setenv("FOURBIT_TRACE", "1")
    registry.register(make(name="picky", priority=90, supports=lambda self, query: Support.no("it is Monday")))
    for _ in range(3):
        fourbit.quantize_4bit(W, blocksize=64)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fourbit: ")]
    assert len(lines) == 1
    assert lines[0].startswith("fourbit: quantize_4bit on cpu (float32, blocksize 64) -> ")
    assert "not picky: it is Monday" in lines[0]
    monkeypatch.setenv("FOURBIT_TRACE", "0")
    dispatch.clear_tables()
    fourbit.quantize_4bit(W)
    assert "fourbit:" not in capsys.readouterr().err


def test_many_threads_resolve_at_once():
    dispatch.clear_tables()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                dispatch.clear_tables()
                fourbit.quantize_4bit(W)
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
