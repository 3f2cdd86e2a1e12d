"""The plugin manager: what a plugin adds is there at once or not at all, and models' hooks are asked one by one."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from types import ModuleType

import pytest
import torch
from torch import nn

import fourbit
from fourbit import codebooks, isolation, plugins, registry
from fourbit.backend import OPS, Backend
from fourbit.codebooks import Codebook
from fourbit.hookspecs import hookimpl
from fourbit.plans.known import KnownModel
from fourbit.reference import ReferenceBackend
from tests.core.test_registry import info_of, make, no_trace_left  # noqa: F401

EVEN = Codebook("even4", tuple((i - 7.5) / 7.5 for i in range(16)))


@pytest.fixture(autouse=True)
def own_manager(monkeypatch, no_trace_left):  # noqa: F811
    """A manager of this test's own, with nothing installed that it could load for models."""
    monkeypatch.setattr(plugins, "_manager", None)
    monkeypatch.setattr(plugins, "_models", lambda: [])
    known = codebooks.snapshot()
    yield
    codebooks.restore(known)


def plugin(name, **hooks):
    """A module with hooks; a pair is a hook and its options."""
    made = ModuleType(name)
    for hook, function in hooks.items():
        function, options = function if isinstance(function, tuple) else (function, {})
        setattr(made, hook, hookimpl(**options)(function))
    return made


def adds(backend, then=None):
    def fourbit_register_backends(register):
        register(backend)
        if then is not None:
            raise then

    return fourbit_register_backends


def names() -> list[str]:
    return [name for name, _ in plugins.manager().list_name_plugin()]


# ---- backends and codebooks ---------------------------------------------------------------------------------


def test_a_plugin_that_is_registered_later_adds_its_things_at_once():
    toy = plugin(
        "toy", fourbit_register_backends=adds(make()), fourbit_register_codebooks=lambda register: register(EVEN)
    )
    assert plugins.manager().register(toy) == "toy"
    assert info_of("fake").state == "ready" and info_of("fake").source == "registered by the program"
    assert fourbit.quantize_4bit(torch.randn(64), quant_type="even4")[1].quant_type == "even4"
    assert names() == ["toy"]


def test_what_one_raises_stays_its_own():
    plugins.manager().register(plugin("good", fourbit_register_backends=adds(make(name="good"))))
    with pytest.raises(OSError, match="no chip"):
        plugins.manager().register(plugin("bad", fourbit_register_backends=adds(make(name="bad"), OSError("no chip"))))
    plugins.manager().register(plugin("last", fourbit_register_backends=adds(make(name="last"))))
    assert [info_of(name).state for name in ("good", "last")] == ["ready", "ready"]


class Installed(EntryPoint):
    """An entry point of a plugin that is there already."""

    def load(self):
        return PLUGINS[self.name]


PLUGINS: dict[str, ModuleType] = {}


def install(module, group=plugins.BACKENDS):
    PLUGINS[module.__name__] = module
    return Installed(module.__name__, module.__name__, group)


@pytest.mark.parametrize("error", (OSError("no chip"), SystemExit(3), KeyboardInterrupt()), ids=repr)
def test_half_a_plugin_is_none(error):
    def then_fails(register):
        register(EVEN)
        raise error

    bad = plugin("bad", fourbit_register_backends=adds(make()), fourbit_register_codebooks=then_fails)
    before = registry.state
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            plugins._load(install(bad))
    else:
        assert plugins._load(install(bad)) is error
    assert names() == [] and "even4" not in codebooks.known()
    assert (registry.state.entries, registry.state.infos) == (before.entries, before.infos)
    assert plugins._load(install(plugin("good", fourbit_register_backends=adds(make())))) is None
    assert names() == ["good"] and info_of("fake").source == "good"


def test_a_hook_that_does_not_exist_is_no_fault_of_the_next_plugin():
    error = plugins._load(install(plugin("bad", fourbit_register_backend=lambda register: None)))
    assert "unknown hook 'fourbit_register_backend'" in str(error) and names() == []
    assert plugins._load(install(plugin("good"))) is None


def test_a_module_of_both_groups_is_one_plugin(monkeypatch):
    both = plugin("both", fourbit_register_backends=adds(make()), fourbit_describe_model=lambda config, names: None)
    assert plugins._load(install(both)) is None
    monkeypatch.setattr(plugins, "_models", lambda: [install(both, plugins.MODELS)])
    assert plugins.ask("fourbit_describe_model", KnownModel, config={}, names=()) == (None, "")
    assert names() == ["both"] and info_of("fake").state == "ready"


def test_two_plugins_of_one_name_are_both_loaded():
    first, second = plugin("toy"), plugin("toy")
    assert plugins._load(install(first)) is None
    PLUGINS["toy"] = second
    assert plugins._load(Installed("toy", "elsewhere.toy", plugins.BACKENDS)) is None
    assert names() == ["toy", "elsewhere.toy"]


# ---- models -------------------------------------------------------------------------------------------------

MODEL = KnownModel(nn.Linear(2, 2), {}, "a toy")


def describe():
    return plugins.ask("fourbit_describe_model", KnownModel, config={}, names=())


def fails(config, names):
    raise OSError("no\nnet")


def test_each_is_asked_until_one_knows():
    asked = []

    def knows(config, names):
        asked.append(names)
        return MODEL

    for name, answer in (("knows", knows), ("says", lambda config, names: "yes"), ("fails", fails)):
        plugins.manager().register(plugin(name, fourbit_describe_model=answer))
    assert describe() == (MODEL, "") and asked == [()]
    plugins.manager().unregister(name="knows")
    assert describe() == (None, "fails: OSError: no net; says returned str, not a KnownModel")


def test_pluggys_options_hold():
    """One that wants to be first is, and a wrapper sees the answer."""
    seen = []

    def wrapper(config, names):
        seen.append((yield))
        return seen[-1]

    last = KnownModel(nn.Linear(2, 2), {}, "the last")
    eager = (lambda config, names: MODEL, {"tryfirst": True})
    plugins.manager().register(plugin("first", fourbit_describe_model=eager))
    plugins.manager().register(plugin("last", fourbit_describe_model=lambda config, names: last))
    plugins.manager().register(plugin("around", fourbit_describe_model=(wrapper, {"wrapper": True})))
    assert describe() == (MODEL, "") and seen == [MODEL]


# ---- Backend.composes ---------------------------------------------------------------------------------------


def test_composes_says_what_is_left_to_the_base_class():
    class Half(Backend):
        quantize_4bit = ReferenceBackend.quantize_4bit

        def embedding_4bit(self, *args):
            raise NotImplementedError

        def composes(self, op):  # an override of it is not believed
            return False

    assert {op for op in OPS if not Backend.composes(Half(), op)} == {"quantize_4bit", "embedding_4bit"}
    entry = isolation.Registered(Half(), "half", ("cpu",), 1, "this test")
    assert isolation.composes(entry, "linear_4bit") and not isolation.composes(entry, "embedding_4bit")
