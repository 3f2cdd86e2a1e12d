"""The real bitsandbytes reads a folder of the zoo: what it computes, or that it cannot and why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import fourbit
from fourbit.config import MARK
from fourbit.nn import PackedModule
from fourbit_transformers import FourbitConfig
from tests.plugins.zoo.entry import Entry, load, packed
from tests.support import installed, skip_or_fail


@torch.no_grad()
def read_by_bitsandbytes(entry: Entry, folder: Path, config: fourbit.QuantConfig, split: str = "") -> str:
    """ "yes" if bitsandbytes computes from a folder of ours what its dequantized weights do; else why it cannot.

    Args:
        folder: where the entry's folders `plain` and `saved` are, the latter quantized as `config` says.

    Raises AssertionError for other values, and where it can read what it is said not to.
    """
    if not (installed("bitsandbytes") and installed("accelerate")):
        skip_or_fail("bitsandbytes and accelerate are not installed: folders are not read with them")
    ours, source = load(entry, folder / "saved"), folder / "saved"
    suited = with_whole_blocks(packed(ours), config)
    if suited != config:
        ours, source = load(entry, folder / "plain", quantization_config=FourbitConfig.of(suited)), folder / "for-them"
        ours.save_pretrained(source)
    as_theirs(source, folder / "theirs")
    wanted = entry.run(dequantized(entry, folder / "plain", ours))
    try:
        found = entry.run(load_theirs(entry, folder / "theirs", set(packed(ours))))
        reads = torch.equal(found, wanted)
    except Exception:
        if not (reason := why_not(entry, ours, split)):
            raise
        return reason
    reason = why_not(entry, ours, split)
    assert reads != bool(reason), f"bitsandbytes {'reads it' if reads else 'computes something else'}; {reason}"
    return reason or "yes"


def why_not(entry: Entry, model: nn.Module, split: str) -> str:
    """What bitsandbytes has no layer for, or what the model does with a layer that bitsandbytes' has not."""
    if any(module.kind == "experts" for module in packed(model).values()):
        return "no: stacked experts"
    if split:
        return f"no: {split}"
    return f"no: the model reads `{entry.reads}`" if entry.reads else ""


def with_whole_blocks(layers: dict[str, PackedModule], config: fourbit.QuantConfig) -> fourbit.QuantConfig:
    """The same, or one of smaller blocks, without layers of shorter rows yet.

    bitsandbytes 0.50.2 misreads rows that are no multiple of the blocksize, on the CPU.
    """
    rows = {name: module.weight_shape[-1] for name, module in layers.items()}
    for blocksize in (config.blocksize, 64):
        if all(row % blocksize == 0 for row in rows.values()):
            return replace(config, blocksize=blocksize)
    return replace(config, blocksize=32, skip_modules=tuple(name for name, row in rows.items() if row % 32))


def as_theirs(source: Path, target: Path) -> None:
    """A copy of a folder without fourbit's mark: transformers gives it to bitsandbytes."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"][MARK]
    (target / "config.json").write_text(json.dumps(config))


def load_theirs(entry: Entry, folder: Path, names: set[str]) -> nn.Module:
    """The folder in bitsandbytes' layers, which are those called `names`."""
    import bitsandbytes

    model = load(entry, folder)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert layers.keys() == names, f"other layers are in 4 bits: {sorted(layers.keys() ^ names)}"
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False  # where it would compute otherwise than by dequantizing
    return model


def dequantized(entry: Entry, folder: Path, model: nn.Module) -> nn.Module:
    """The 16-bit model in `folder`, with the values of the 4-bit `model`."""
    twin = load(entry, folder)
    for name, module in packed(model).items():
        if module.transposed:  # Conv1D adds its bias in the product, and bitsandbytes has nn.Linear's order
            layer = nn.Linear(*reversed(module.weight_shape), bias=False, dtype=module.dtype)
            layer.bias = twin.get_submodule(name).bias
            twin.set_submodule(name, layer)
        weight = twin.get_parameter(name if module.kind == "experts" else f"{name}.weight")
        weight.data = module.dequantize()
    twin.config._is_quantized = True  # some models ask, and then compute in another order
    return twin
