"""Backends that say rubbish: checked when registered, and never able to break another backend's op or the listings."""

from __future__ import annotations

import math

import pytest
import torch

import fourbit
from fourbit import dispatch, registry
from fourbit.backend import Backend, OpQuery, Support
from fourbit.cli.backends import backends as list_backends
from tests.core.test_registry import QUERY, W, info_of, make, no_trace_left, raising  # noqa: F401


class Panic(BaseException):
    """As pyo3's PanicException, which is no Exception."""


class NoRepr:
    def __repr__(self):
        raise Panic("repr")


def everything_else_works(capsys) -> None:
    """Ops, the list, explain and the command do, and agree on what runs."""
    dispatch.clear_tables()
    packed, state = fourbit.quantize_4bit(W)
    y = fourbit.linear_4bit(torch.randn(2, 64), packed, state)
    assert y.shape == (2, 8)
    assert info_of("reference").state == "ready"
    assert str(fourbit.explain("linear_4bit")) and fourbit.explain("linear_4bit").backend != "fake"
    list_backends(as_json=True)
    list_backends()
    assert "reference" in capsys.readouterr().out


def getattribute(self, name):
    raise Panic(f"attribute {name}")


REJECTED = {
    "priority True": ({"priority": True}, "its priority True is not a number"),
    "priority NaN": ({"priority": math.nan}, "its priority nan is not a number"),
    "priority of words": ({"priority": "high"}, "its priority 'high' is not a number"),
    "priority None": ({"priority": None}, "its priority None is not a number"),
    "priority a tensor": ({"priority": torch.ones(2)}, "is not a number"),
    "api_version True": ({"api_version": True}, "API version True"),
    "api_version 1.0": ({"api_version": 1.0}, "API version 1.0"),
    "name a bytes": ({"name": b"fake"}, "its name b'fake' is not a lower-case word"),
    "name with a newline": ({"name": "fake\n"}, r"its name 'fake\n' is not a lower-case word"),
    "device types of a list inside": ({"device_types": (["cpu"],)}, "not a tuple of torch device types"),
    "blocksize 63": ({"default_blocksize": lambda self, device: 63}, "default_blocksize(cpu) returned 63, not a power"),
    "blocksize 0": ({"default_blocksize": lambda self, device: 0}, "returned 0"),
    "blocksize 16": ({"default_blocksize": lambda self, device: 16}, "returned 16, not a power of two from 32 to 4096"),
    "blocksize 8192": ({"default_blocksize": lambda self, device: 8192}, "returned 8192"),
    "blocksize 64.0": ({"default_blocksize": lambda self, device: 64.0}, "returned 64.0"),
    "blocksize True": ({"default_blocksize": lambda self, device: True}, "returned True"),
    "blocksize None": ({"default_blocksize": lambda self, device: None}, "returned None"),
    "blocksize of its second type": (
        {"device_types": ("cpu", "cuda"), "default_blocksize": lambda self, device: 64 if device.type == "cpu" else 7},
        "default_blocksize(cuda) returned 7",
    ),
    "unavailable False": ({"unavailable": lambda self: False}, "its unavailable() returned False, neither None nor"),
    "unavailable a list": ({"unavailable": lambda self: ["no chip"]}, "returned ['no chip'], neither None nor"),
    "unavailable without a repr": ({"unavailable": lambda self: NoRepr()}, "NoRepr object"),
    "an op that is none": ({"linear_4bit": "fast"}, "its linear_4bit is 'fast', not a method"),
    "supports is None": ({"supports": None}, "its supports is None, not a method"),
    "an op of other arguments": ({"linear_4bit": lambda self, x, packed: x}, "(x, packed) does not take (x,"),
    "describe of other arguments": ({"describe": lambda self, query: ""}, "does not take (query, shape)"),
    "supports of other arguments": ({"supports": lambda self, op, dtype: True}, "does not take (query)"),
}  # fmt: skip

FAILED = {
    "a priority that raises": ({"priority": property(raising(Panic("no")))}, "its priority raised Panic: no"),
    "a name that raises": ({"name": property(raising(SystemExit(3)))}, "its name raised SystemExit: 3"),
    "an api_version that raises": ({"api_version": property(raising(GeneratorExit()))}, "raised GeneratorExit"),
    "every attribute raises": ({"__getattribute__": getattribute}, "raised Panic: attribute"),
    "an op that cannot be had": ({"linear_4bit": property(raising(Panic("no")))}, "its linear_4bit raised Panic: no"),
    "unavailable panics": ({"unavailable": raising(Panic("unwrap"))}, "its unavailable() raised Panic: unwrap"),
    "default_blocksize exits": ({"default_blocksize": raising(SystemExit("bye"))}, "raised SystemExit: bye"),
    "a device type that torch has not": ({"device_types": ("warp",)}, "its device type 'warp' is none of torch's"),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED | FAILED)
def test_rubbish_is_left_out_when_registered(case, capsys):
    attributes, reason = (REJECTED | FAILED)[case]
    before = registry.state.entries
    with pytest.warns(fourbit.BackendWarning) as caught:
        registry.register(make(**({"priority": 90} | attributes)))
    assert len(caught) == 1 and reason in str(caught[0].message)
    assert registry.state.entries == before
    (info,) = [info for info in fourbit.backends() if info.state in ("rejected", "failed") and info.source == SOURCE]
    assert reason in info.reason and info.state == ("rejected" if case in REJECTED else "failed")
    assert bool(info.traceback) == (case in FAILED)
    everything_else_works(capsys)


SOURCE = "registered by the program"


def test_an_object_that_claims_to_be_a_backend(capsys):
    class Claims:
        __class__ = Backend
        name, priority, device_types, api_version = "fake", 90, ("cpu",), 2

    with pytest.warns(fourbit.BackendWarning, match="not an instance of fourbit.backend.Backend but of Claims"):
        registry.register(Claims())
    everything_else_works(capsys)


def test_a_class_whose_constructor_raises(capsys):
    with pytest.warns(fourbit.BackendWarning, match="its constructor raised Panic: no chip"):
        registry.register(constructor(Panic("no chip")))
    everything_else_works(capsys)


def constructor(error: BaseException) -> type[Backend]:
    return type("Made", (Backend,), {"name": "fake", "device_types": ("cpu",), "__init__": raising(error)})


def test_an_interrupt_is_no_failure_of_the_backend():
    before = registry.state
    for method in ("unavailable", "default_blocksize"):
        with pytest.raises(KeyboardInterrupt):
            registry.register(make(**{method: raising(KeyboardInterrupt())}))
    assert registry.state is before
    registry.register(make(priority=90, supports=raising(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        fourbit.quantize_4bit(W, blocksize=64)
    assert not dispatch.resolutions() and not registry.state.tables["quantize_4bit"]


# ---- later: what was right when it was registered ---------------------------------------------------------


LATER = {
    "supports panics": ({"supports": raising(Panic("unwrap"))}, "its supports() raised Panic: unwrap"),
    "supports exits": ({"supports": raising(SystemExit(1))}, "its supports() raised SystemExit: 1"),
    "an ok that is none": (
        {"supports": lambda self, query: Support(torch.ones(2))},
        "whose fields are not a bool and a string",
    ),
    "a reason that is none": (
        {"supports": lambda self, query: Support(False, NoRepr())},
        "whose fields are not a bool and a string",
    ),
    "an answer that raises": ({"supports": lambda self, query: NoRepr()}, "not a Support"),
    "a Support of its own": (
        {"supports": lambda self, query: type("Mine", (Support,), {"__bool__": raising(Panic("no"))})(True)},
        "not a Support",
    ),
}


@pytest.mark.filterwarnings("ignore::fourbit.registry.BackendWarning")
@pytest.mark.parametrize("case", LATER)
def test_the_op_runs_on_the_next_one(case, capsys):
    attributes, reason = LATER[case]
    registry.register(make(priority=90, **attributes))
    assert info_of("fake").state == "ready"
    found = dispatch.resolve(QUERY)
    assert found.entry.name != "fake" and reason in dict(found.rejected)["fake"]
    assert reason in str(fourbit.explain("quantize_4bit", blocksize=64))
    everything_else_works(capsys)


def test_a_default_blocksize_of_rubbish_on_another_device():
    """Right for "cpu" when it was registered; the backend is passed over."""
    answers = iter((64, 7))
    registry.register(make(priority=90, default_blocksize=lambda self, device: next(answers)))
    with pytest.warns(fourbit.BackendWarning, match="'fake': default_blocksize.cpu. returned 7, not a power of two"):
        packed, state = fourbit.quantize_4bit(W)
    assert state.blocksize == 64
    fourbit.quantize_4bit(W)  # and does not ask again
    assert next(answers, "asked no more") == "asked no more"


def test_no_default_blocksize_at_all_names_each_reason():
    answers = iter((64, 7))
    registry.register(make(default_blocksize=lambda self, device: next(answers)))
    with fourbit.use_backend("fake"), pytest.warns(fourbit.BackendWarning):
        with pytest.raises(
            fourbit.NoBackendError, match=r"(?s)quantizes on cpu.*fake: its default_blocksize\(cpu\) returned 7"
        ):
            fourbit.quantize_4bit(W)  # fmt: skip


@pytest.mark.parametrize(
    ("describe", "words"),
    (
        (raising(Panic("no words")), "its describe() raised Panic: no words"),
        (lambda self, query, shape: None, "its describe() returned None, not a string"),
        (lambda self, query, shape: NoRepr(), "NoRepr object"),
    ),
)
def test_a_backend_that_cannot_be_described_runs_all_the_same(describe, words):
    registry.register(make(priority=90, describe=describe))
    answer = fourbit.explain("quantize_4bit", blocksize=64)
    assert answer.backend == "fake" and words in answer.path and words in str(answer)


def test_attributes_that_change_later_change_nothing(capsys):
    """The registry keeps what it has checked: name, device types and priority are not read again."""
    backend = make(priority=90)
    registry.register(backend)
    listed = fourbit.backends()
    for name, value in (("priority", -5), ("name", "other"), ("device_types", ("cuda",))):
        setattr(type(backend), name, value)
    dispatch.clear_tables()
    assert fourbit.backends() == listed and dispatch.resolve(QUERY).entry.name == "fake"
    for name in ("priority", "name", "device_types", "api_version"):
        setattr(type(backend), name, property(raising(Panic(name))))
    dispatch.clear_tables()
    assert fourbit.backends() == listed and dispatch.resolve(QUERY).backend is backend
    registry.register(make(name="third"))  # sorts them all anew
    with fourbit.use_backend("fake") as chosen:
        assert chosen is backend
        fourbit.quantize_4bit(W)
    list_backends()
    assert "fake" in capsys.readouterr().out


def test_a_method_that_is_gone_later():
    backend = make(priority=90)
    registry.register(backend)
    type(backend).quantize_4bit = None
    found = dispatch.resolve(QUERY)
    assert found.entry.name != "fake" and dict(found.rejected)["fake"] == "its quantize_4bit is None, not a method"
    fourbit.quantize_4bit(W, blocksize=64)


def test_methods_of_another_language_have_no_signature_to_compare():
    registry.register(make(priority=90, describe=property(lambda self: "{0.op} {1}".format)))
    assert fourbit.explain("quantize_4bit", blocksize=64, shape=(8, 64)).path == "quantize_4bit (8, 64)"


def test_ask_of_a_backend_that_is_not_registered():
    with pytest.raises(LookupError, match="is not registered"):
        dispatch.ask(make(), OpQuery("quantize_4bit", torch.device("cpu"), torch.float32, 64))
