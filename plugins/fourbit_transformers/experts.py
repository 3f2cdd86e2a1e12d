"""Expert matrices that a folder holds one by one, stacked for models that hold them as one 3-D weight.

transformers 5 keeps `experts.gate_up_proj` [experts, 2·intermediate, hidden] in memory and writes
`experts.0.gate_proj.weight`, `experts.0.up_proj.weight`, … to disk. Packed codes and scales of whole blocks are
put end to end; no value changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fourbit.checkpoint.reader import Checkpoint
from fourbit.state import QuantState

_ONE_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_STACKED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Stacked parameter: the matrices that make up one expert's part of it, under either naming."""


def stacks(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Which of `names` belong together: the stacked parameter's name to its matrices, in order of rows.

    Raises ValueError if an expert of a stack is incomplete.
    """
    matrices: dict[str, dict[tuple[int, str], str]] = {}
    for name in names:
        match = _ONE_EXPERT.fullmatch(name)
        if match is not None:
            matrices.setdefault(match[1], {})[int(match[2]), match[3]] = name
    modules = dict(model.named_modules())
    found: dict[str, list[str]] = {}
    for module_name, parts in matrices.items():
        module = modules.get(module_name)
        if module is None or isinstance(module, nn.ModuleList):
            continue  # the model holds them one by one, too
        for stacked, spellings in _STACKED.items():
            parameter = module._parameters.get(stacked)
            order = next((s for s in spellings if (0, s[0]) in parts), None)
            if parameter is None or order is None:
                continue
            wanted = [(expert, leaf) for expert in range(parameter.shape[0]) for leaf in order]
            missing = next((key for key in wanted if key not in parts), None)
            if missing is not None:
                raise ValueError(f"{module_name}.{missing[0]}.{missing[1]}.weight is missing from the folder")
            found[f"{module_name}.{stacked}"] = [parts[key] for key in wanted]
    return found


def read_stack(checkpoint: Checkpoint, names: list[str], shape: torch.Size) -> tuple[Tensor, QuantState]:
    """The matrices `names` as one packed weight of `shape`.

    Its scales are plain float32 also where the folder's are double-quantized: each matrix has an offset of its
    own, which one stack cannot keep. Raises ValueError if they do not fit together.
    """
    packed, scales = [], []
    first: QuantState | None = None
    for name in names:
        codes, state = checkpoint.read_4bit(name)
        first = first or state
        same = (state.blocksize, state.quant_type, state.dtype) == (first.blocksize, first.quant_type, first.dtype)
        if not same or state.shape[-1:] != shape[-1:]:
            raise ValueError(f"{name} cannot be stacked with {names[0]}: it is quantized or shaped otherwise")
        if state.numel % state.blocksize:
            raise ValueError(f"{name} has {state.numel} elements, no multiple of its blocksize {state.blocksize}")
        packed.append(codes.flatten())
        scales.append(state.scales())
    assert first is not None
    stacked = QuantState(torch.cat(scales), shape, first.code, first.blocksize, first.quant_type, first.dtype)
    return torch.cat(packed), stacked
