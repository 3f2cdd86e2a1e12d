"""What holds for any model, tried on one entry of the zoo: every way gives one 4-bit model, and folders go round."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fourbit
import fourbit_transformers
from fourbit.checkpoint import CheckpointError
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.reader import META_MARK
from fourbit_transformers import FourbitConfig
from tests.plugins.zoo.entry import Entry, load, packed
from tests.plugins.zoo.models import ENTRIES
from tests.plugins.zoo.theirs import read_by_bitsandbytes

BLOCKSIZES = (32, 64, 128)


@dataclass(frozen=True)
class Row:
    """What the table says of one entry."""

    name: str
    family: str
    layers: str
    alike: str
    reloaded: str
    bitsandbytes: str

    def __str__(self) -> str:
        return f"| {' | '.join(astuple(self))} |"


def options(entry: Entry, apart: bool = False) -> fourbit.QuantConfig:
    """How the entry is quantized: twelve entries that follow each other have all the combinations.

    Args:
        apart: whether it has experts that are stacked in memory and lie one by one in a folder, or layers that lie in
            one matrix there. Not double-quantized then: the scales of each matrix have a mean of their own.
    """
    place = ENTRIES.index(entry)
    return fourbit.QuantConfig(("nf4", "fp4")[place % 2], BLOCKSIZES[place % 3], place // 6 % 2 == 1 and not apart)


def kinds(plan: fourbit.QuantPlan) -> set[str]:
    """Of the layers that are quantized."""
    return {t.kind for t in plan.quantized}


def examine(entry: Entry, folder: Path) -> Row:
    """Everything, in a folder of its own; the row that the table has for it.

    Raises AssertionError, or what the library raises, where something does not hold.
    """
    in_16_bit = fair_test(entry, folder)
    plain = load(entry, folder / "plain")
    stored, held = fourbit.plan(folder / "plain"), fourbit.plan(plain)
    assert stored.described_by.startswith(f"{entry.kind} of transformers ")
    found, wanted = decisions(stored), decisions(held)
    # some of what a model has is computed, and in no folder
    assert found == {name: rules for name, rules in wanted.items() if name in found or "quantize" in rules}
    assert stored.left_modules == held.left_modules
    divided = {module for t in stored.quantized if len(t.modules) > 1 for module in t.modules}
    config = options(entry, apart=kinds(held) - kinds(stored) == {"experts"} or bool(divided))
    in_memory = fourbit.quantize_model(plain, config)
    if not packed(in_memory):
        return nothing_to_quantize(entry, folder, config)
    on_the_fly = load(entry, folder / "plain", quantization_config=FourbitConfig.of(config))
    quantize_checkpoint(folder / "plain", folder / "cli", config)
    on_the_fly.save_pretrained(folder / "saved")  # before they run: some routers take another dtype then, for good
    in_memory.save_pretrained(folder / "saved-too")

    logits = entry.run(in_memory)
    error = float((logits.float() - in_16_bit.float()).norm() / in_16_bit.float().norm())
    assert 0 < error < 0.9, f"4-bit and 16-bit logits are {error:.3f} apart"
    same_model(entry, on_the_fly, in_memory, logits, "on the fly")
    for name in ("saved", "saved-too"):
        same_model(entry, load(entry, folder / name), in_memory, logits, f"the folder {name}")
    same_files(folder / "saved", folder / "saved-too")

    stay = sorted(modules(held) - modules(stored))
    if stay:  # transformers makes them of a part of a weight, which other readers cannot do with a packed one
        without = replace(config, skip_modules=tuple(stay))
        in_memory = fourbit.quantize_model(load(entry, folder / "plain"), without)
        logits = entry.run(in_memory)
    else:
        same_files(folder / "saved", folder / "cli")
    same_model(entry, load(entry, folder / "cli"), in_memory, logits, "the folder of fourbit quantize")
    same_model(entry, fourbit_transformers.load(folder / "cli"), in_memory, logits, "the same, by load")
    split = f"{listed(sorted(divided))} in one weight" if divided else ""
    return Row(
        name=entry.name,
        family=entry.family,
        layers=str(len(packed(on_the_fly))),
        alike=f"yes; in the folder {listed(stay)} in 16 bit" if stay else "yes",
        reloaded="yes",
        bitsandbytes=read_by_bitsandbytes(entry, folder, config, split),
    )


def fair_test(entry: Entry, folder: Path) -> Tensor:
    """Save the model as `plain`; what it computes, which must be something, and the same from the folder."""
    built = entry.build()
    built.save_pretrained(folder / "plain")
    found = entry.run(built)
    assert found.isfinite().all() and found.float().std() > 0
    assert torch.equal(entry.run(load(entry, folder / "plain")), found), "the folder has not all of the model"
    return found


def decisions(plan: fourbit.QuantPlan) -> dict[str, set[str]]:
    """What becomes of each module's matrices. A stack of experts and the matrices that a folder has of it are alike."""
    alike = {"stacked expert weights": "quantize", "linear weight": "quantize"}
    found: dict[str, set[str]] = {}
    for t in plan.tensors:
        if (
            len(t.shape) > 1 and t.rule != "buffer" and not t.rule.startswith("tied to ")
        ):  # a folder has but one of those
            for module in t.modules:
                found.setdefault(module, set()).add(alike.get(t.rule, t.rule))
    return found


def modules(plan: fourbit.QuantPlan) -> set[str]:
    """That are quantized; a stack of experts by the module's name."""
    return {module for t in plan.quantized if t.kind != "experts" for module in t.modules}


def listed(names: list[str]) -> str:
    """The last parts of their names."""
    return ", ".join(dict.fromkeys(f"`{name.rpartition('.')[2]}`" for name in names))


def nothing_to_quantize(entry: Entry, folder: Path, config: fourbit.QuantConfig) -> Row:
    """Both ways to a folder say so, and write none."""
    for make in (
        lambda: quantize_checkpoint(folder / "plain", folder / "cli", config),
        lambda: load(entry, folder / "plain", quantization_config=FourbitConfig.of(config)).save_pretrained(
            folder / "cli"
        ),
    ):
        try:
            make()
        except (CheckpointError, ValueError) as error:
            assert "quantized" in str(error), error
        else:
            raise AssertionError(f"{entry.name}: nothing was quantized, and nothing was said")
        assert not (folder / "cli").exists()
    owners = sorted({t.rule.split(" is not")[0] for t in fourbit.plan(folder / "plain").skipped if not t.deliberate})
    return Row(entry.name, entry.family, "0", *[f"none: {', '.join(owners)}"] * 3)


def same_model(entry: Entry, model: nn.Module, other: nn.Module, logits: Tensor, way: str) -> None:
    """The same layers in 4 bits, the same bits in them, all else the same too, and the same output."""
    ours, theirs = packed(model), packed(other)
    found = entry.run(model)  # some routers take another dtype at the first run
    assert ours.keys() == theirs.keys(), f"{way}: other layers are in 4 bits: {sorted(ours.keys() ^ theirs.keys())}"
    for name, module in ours.items():
        assert type(module) is type(theirs[name]), f"{way}: {name}"
    state, wanted = model.state_dict(), other.state_dict()
    assert state.keys() == wanted.keys(), f"{way}: other tensors: {sorted(state.keys() ^ wanted.keys())}"
    unlike = [n for n, t in state.items() if t.dtype != wanted[n].dtype or not torch.equal(t, wanted[n])]
    assert not unlike, f"{way}: other values in {unlike}"
    assert torch.equal(found, logits), f"{way}: other logits"


def same_files(folder: Path, other: Path) -> None:
    """The same tensors under the same names, and the same configuration."""
    tensors, wanted = (load_file(each / "model.safetensors") for each in (folder, other))
    assert tensors.keys() == wanted.keys(), f"other names in files: {sorted(tensors.keys() ^ wanted.keys())}"
    unlike = [name for name in tensors if not _same(name, tensors[name], wanted[name])]
    assert not unlike, f"other values in files: {unlike}"
    ours, theirs = (json.loads((each / "config.json").read_text()) for each in (folder, other))
    assert ours == theirs, "another config.json"


def _same(name: str, a: Tensor, b: Tensor) -> bool:
    if META_MARK in name:  # JSON, which may have blanks at its end
        return json.loads(bytes(a.tolist())) == json.loads(bytes(b.tolist()))
    if name.endswith("e_score_correction_bias"):
        a, b = a.float(), b.float()  # which older routers take to float32 at the first run
    return a.dtype == b.dtype and torch.equal(a, b)
