"""Folders whose class a plugin knows: its model says what the layers are, and what it breaks leaves names."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fourbit
from fourbit import plugins
from fourbit.hookspecs import hookimpl
from fourbit.plans import known
from fourbit.registry import BackendWarning
from tests.folders import folder_of


class Special(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class WithSubclass(nn.Module):
    def __init__(self):
        super().__init__()
        self.special, self.plain = Special(64, 64), nn.Linear(64, 64)
        self.x_embedder = nn.Linear(64, 64)  # an nn.Linear of this name
        self.attention = nn.MultiheadAttention(64, 4)
        self.register_buffer("table", torch.randn(64, 64))


@pytest.fixture(autouse=True)
def no_other_plugin(monkeypatch):
    """A manager of this test's own, and nothing installed that it could load."""
    monkeypatch.setattr(plugins, "_manager", None)
    monkeypatch.setattr(plugins, "_models", lambda: [])


installed = plugins._models.__wrapped__  # without its cache


def plug_in(answer, name="toy"):
    """Register a plugin that describes models by `answer`."""
    plugin = ModuleType(name)
    plugin.fourbit_describe_model = hookimpl(answer)
    plugins.manager().register(plugin, name)


def answer_with(model):
    def describe(config, names):
        with known.without_weights(names):
            found = model()
        assert all(p.device.type == "meta" for p in found.parameters())
        return known.KnownModel(found, {n: known.Target((n,)) for n in names if n in found.state_dict()}, "a toy")

    return describe


def test_a_known_class_says_what_its_layers_are(tmp_path):
    model = WithSubclass()
    folder = folder_of(model, tmp_path / "f")
    plug_in(answer_with(WithSubclass))
    stored, held = fourbit.plan(folder), fourbit.plan(model)
    assert stored.described_by == "a toy"
    rules = {t.name: t.rule for t in stored.tensors}
    assert rules.pop("table") == "buffer"
    assert rules == {t.name: t.rule for t in held.tensors}
    assert {t.module for t in stored.quantized} == {"plain", "x_embedder"}
    assert stored.left_modules == held.left_modules == ("lm_head", "special", "attention.out_proj")


class Rearranged(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.out, self.lm_head = (nn.Linear(64, 64, bias=False) for _ in range(4))
        self.experts = nn.Module()
        self.experts.up_proj = nn.Parameter(torch.empty(2, 64, 64))


def test_what_a_reader_rearranges_is_quantized_only_as_an_expert(tmp_path):
    targets = {
        "qk.weight": known.Target(("q.weight", "k.weight"), rearranged=True),
        "blk.o.weight": known.Target(("out.weight",)),
        "head.weight": known.Target(("lm_head.weight",)),
        "mlp.experts.0.weight": known.Target(("experts.up_proj",), rearranged=True),
        "mlp.experts.1.weight": known.Target(("experts.up_proj",), rearranged=True),
    }
    save_file({n: torch.randn(128 if n == "qk.weight" else 64, 64) for n in targets}, tmp_path / "model.safetensors")
    model = Rearranged().to("meta")
    plug_in(lambda config, names: known.KnownModel(model, targets, "a toy"))
    planned = fourbit.plan(tmp_path)
    left = {t.name: t.rule for t in planned.skipped}
    assert left.keys() == {"qk.weight", "head.weight"} and left["head.weight"] == "output head"
    assert left["qk.weight"].startswith("rearranged into other layers")
    assert {t.name: t.module for t in planned.quantized} == {
        **{"blk.o.weight": "out", "mlp.experts.0.weight": "experts", "mlp.experts.1.weight": "experts"}
    }
    assert planned.left_modules == ("lm_head", "q", "k")
    for pattern in ("o", "blk.o", "blk.o.weight", "out", "out.weight"):  # the folder's name of it, or the model's
        config = fourbit.QuantConfig(skip_modules=(pattern,))
        assert {t.module for t in fourbit.plan(tmp_path, config).quantized} == {"experts"}
        assert fourbit.plan(tmp_path, config).left_modules == ("lm_head", "q", "k", "out")


@pytest.mark.parametrize(
    ("blocksize", "skip", "rule"),
    (
        (64, (), "linear weight"),
        (64, ("k",), "divided among layers of which k.weight stays: skip_modules: k"),
        (64, ("qk",), "skip_modules: qk"),
        (4096, (), "linear weight"),
    ),
)
def test_what_a_reader_divides_between_rows_is_quantized_as_one(tmp_path, blocksize, skip, rule):
    targets = {
        "qk.weight": known.Target(("q.weight", "k.weight"), rearranged=True, by_rows=True),
        "half.0.weight": known.Target(("out.weight",), rearranged=True, by_rows=True),
        "half.1.weight": known.Target(("out.weight",), rearranged=True, by_rows=True),
        "head.weight": known.Target(("lm_head.weight",)),
    }
    rows = {"qk.weight": 128, "head.weight": 64}
    save_file({n: torch.randn(rows.get(n, 32), 64) for n in targets}, tmp_path / "model.safetensors")
    plug_in(lambda config, names: known.KnownModel(Rearranged().to("meta"), targets, "a toy"))
    planned = fourbit.plan(tmp_path, fourbit.QuantConfig(blocksize=blocksize, skip_modules=skip))
    by_name = {t.name: t for t in planned.tensors}
    assert by_name["qk.weight"].rule == rule and by_name["qk.weight"].modules == ("q", "k")
    torn = blocksize == 4096  # each half has 2048 elements
    for half in ("half.0.weight", "half.1.weight"):
        assert by_name[half].action == ("skip" if torn else "quantize")
        assert by_name[half].rule.startswith("rearranged into" if torn else "linear weight")
    left = {"q", "k"} if skip else set()
    assert set(planned.left_modules) == {"lm_head"} | left | ({"out"} if torn else set())


def fails(config, names):
    raise ImportError("no such library")


def leaves(config, names):
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("answer", "reason"),
    (
        (fails, "names (toy: ImportError: no such library)"),
        (leaves, "names (toy: SystemExit: 3)"),
        (lambda config, names: "yes", "names (toy returned str, not a KnownModel)"),
        (lambda config, names: None, "names (its config.json names no class that a plugin knows)"),
    ),
)
def test_a_plugin_that_does_not_answer_leaves_names_and_its_reason(tmp_path, answer, reason):
    folder = folder_of(WithSubclass(), tmp_path / "f")
    plug_in(answer)
    planned = fourbit.plan(folder)
    assert planned.described_by == reason and reason in planned.summary()
    assert {t.rule for t in planned.tensors if t.module == "x_embedder"} >= {"embedding"}


WORKS = """
import sys
from importlib.metadata import EntryPoint, EntryPoints
from torch import nn
from fourbit.hookspecs import hookimpl
from fourbit.plans import known

@hookimpl
def fourbit_describe_model(config, names):
    with known.without_weights(names):
        model = nn.Sequential(nn.Linear(64, 64))
    return known.KnownModel(model, {name: known.Target((name,)) for name in names}, "a plugin's Sequential")

@hookimpl
def fourbit_model_quantized(model, config):
    model.told = [config.quant_type]

@hookimpl
def fourbit_model_dequantized(model):
    model.told.append("dequantized")
"""
PANICS = """
from fourbit.hookspecs import hookimpl

class PanicException(BaseException): pass

@hookimpl
def fourbit_describe_model(config, names):
    raise PanicException("called `unwrap` on a `None` value")

@hookimpl
def fourbit_model_quantized(model, config):
    raise PanicException("no such model")

@hookimpl
def fourbit_model_dequantized(model):
    raise PanicException("nor this one")
"""


@pytest.fixture
def install(monkeypatch, tmp_path):
    """`install(name=source)`: modules that entry points of the group name."""

    plugins.load()  # the backends are the real ones

    def make(**modules):
        found = []
        for name, source in modules.items():
            (tmp_path / f"models_{tmp_path.name}_{name}.py").write_text(source)
            found.append(EntryPoint(name, f"models_{tmp_path.name}_{name}", plugins.MODELS))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: EntryPoints(found).select(group=group))
        monkeypatch.setattr(plugins, "_models", installed)

    return make


@pytest.mark.parametrize(
    ("modules", "described_by"),
    (
        ({"a": PANICS, "b": WORKS}, "a plugin's Sequential"),
        ({"a": PANICS}, "names (a: PanicException: called `unwrap` on a `None` value)"),
        (
            {"a": "import nothing_of_that_name"},
            "names (a: ModuleNotFoundError: No module named 'nothing_of_that_name')",
        ),
    ),
)
def test_plugins_come_through_entry_points(install, tmp_path, modules, described_by):
    install(**modules)
    folder = folder_of(nn.Sequential(nn.Linear(64, 64)), tmp_path / "f")
    for _ in range(2):
        assert fourbit.plan(folder).described_by == described_by


@pytest.mark.parametrize("modules", ({"a": PANICS, "b": WORKS}, {"b": PANICS, "a": WORKS}))
def test_each_plugin_is_told_of_what_happens_to_a_model(install, modules):
    """One that raises gives a warning, and keeps nothing from the model or from the others."""
    install(**modules)
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.warns(BackendWarning, match="fourbit_model_quantized failed: .*: PanicException: no such model"):
        fourbit.quantize_model(model, fourbit.QuantConfig("fp4"))
    with pytest.warns(BackendWarning, match="fourbit_model_dequantized failed: .*: PanicException: nor this one"):
        fourbit.dequantize_model(model)
    assert model.told == ["fp4", "dequantized"] and type(model[0]) is nn.Linear


def test_a_model_of_absurd_size_is_not_built():
    def endless():
        return nn.Sequential(*(nn.Linear(2, 2) for _ in range(10**9)))

    with pytest.raises(known.TooLargeError, match="more than 10020 modules"), known.without_weights(("a",)):
        endless()
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_a_model_that_takes_too_long_is_not_built(monkeypatch):
    monkeypatch.setattr(known, "MOST_SECONDS", 0.0)
    with pytest.raises(known.TooLargeError, match="takes more than 0 s"), known.without_weights(("a",)):
        nn.Linear(2, 2)


def test_importing_fourbit_imports_no_such_plugin():
    code = (
        "import sys, fourbit, fourbit.nn, fourbit.plans; from torch import nn; fourbit.plan(nn.Linear(64, 64));"
        "print([n for n in sys.modules if n.removeprefix('fourbit_').startswith(('transformers', 'diffusers'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
