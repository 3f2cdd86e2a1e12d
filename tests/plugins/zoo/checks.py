"""What holds for any model, tried on one entry of the zoo: every way gives one 4-bit model, and folders go round."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import fourbit
import fourbit_transformers
from fourbit.checkpoint import CheckpointError
from fourbit.checkpoint.quantize import quantize_checkpoint
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
        apart: whether it has experts that are stacked in memory and lie one by one in a folder. Not double-quantized
            then: the scales of a stack have one mean in memory, in a folder each matrix' have their own.
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
    built = entry.build()
    built.save_pretrained(folder / "plain")
    want, plain = entry.run(built), load(entry, folder / "plain")
    assert want.isfinite().all() and want.float().std() > 0 and torch.equal(entry.run(plain), want), "no fair test"

    stored, held = fourbit.plan(folder / "plain"), fourbit.plan(plain)
    config = options(entry, apart=kinds(held) - kinds(stored) == {"experts"})
    in_memory = fourbit.quantize_model(plain, config)
    if not packed(in_memory):
        return nothing_to_quantize(entry, folder, config)
    logits = entry.run(in_memory)
    error = float((logits.float() - want.float()).norm() / want.float().norm())
    assert 0 < error < 0.9, f"4-bit and 16-bit logits are {error:.3f} apart"

    on_the_fly = load(entry, folder / "plain", quantization_config=door_config(config))
    same_model(entry, on_the_fly, in_memory, logits, "on the fly")
    quantize_checkpoint(folder / "plain", folder / "cli", config)
    stay = sorted(modules(held) - modules(stored))
    want, logits_of_folder = in_memory, logits
    if stay:  # transformers makes them of a part of a weight, which other readers cannot do with a packed one
        want = fourbit.quantize_model(load(entry, folder / "plain"), replace(config, skip_modules=tuple(stay)))
        logits_of_folder = entry.run(want)
    same_model(entry, load(entry, folder / "cli"), want, logits_of_folder, "the folder of fourbit quantize")
    same_model(entry, fourbit_transformers.load(folder / "cli"), want, logits_of_folder, "the same, by load")

    for model, name in ((on_the_fly, "saved"), (in_memory, "saved-too")):
        model.save_pretrained(folder / name)
        same_model(entry, load(entry, folder / name), model, logits, f"the folder {name}")
    return Row(
        name=entry.name,
        family=entry.family,
        layers=str(len(packed(in_memory))),
        alike=f"yes; in the folder {listed(stay)} in 16 bit" if stay else "yes",
        reloaded="yes",
        bitsandbytes=read_by_bitsandbytes(entry, folder, config, f"{listed(stay)} in one weight" if stay else ""),
    )


def modules(plan: fourbit.QuantPlan) -> set[str]:
    """That are quantized; a stack of experts by the module's name."""
    return {t.module for t in plan.quantized if t.kind != "experts"}


def listed(names: list[str]) -> str:
    """The last parts of their names."""
    return ", ".join(dict.fromkeys(f"`{name.rpartition('.')[2]}`" for name in names))


def nothing_to_quantize(entry: Entry, folder: Path, config: fourbit.QuantConfig) -> Row:
    """Both ways to a folder say so, and write none."""
    for make in (
        lambda: quantize_checkpoint(folder / "plain", folder / "cli", config),
        lambda: load(entry, folder / "plain", quantization_config=door_config(config)).save_pretrained(folder / "cli"),
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


def door_config(config: fourbit.QuantConfig) -> fourbit_transformers.FourbitConfig:
    """The same for from_pretrained."""
    return fourbit_transformers.FourbitConfig.of(config)


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
