"""The rules: from the description of a layer to whether it is quantized, and why."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

from fourbit import checks
from fourbit.config import QuantConfig
from fourbit.plans.layer import HEAD, ROUTER, Layer
from fourbit.state import dtype_name

_ALWAYS_LISTED = "lm_head"  # a folder of a base model has none, and may be loaded with one


_REARRANGED = "rearranged into other layers when it is loaded, which 4-bit blocks do not survive"


class Decision(NamedTuple):
    """Whether a tensor is quantized, and the last two fields of a PlannedTensor on why."""

    quantize: bool
    rule: str
    deliberate: bool = True


def decide(layer: Layer, config: QuantConfig) -> Decision:
    """What becomes of one tensor; `config` has a blocksize.

    Layers that share one storage, or are stored as one matrix, are quantized together or not at all.
    """
    own = _alone(layer, config)
    if layer.first:
        own = Decision(own.quantize, f"tied to {layer.first}", own.deliberate)
    for other in layer.tied if own.quantize else ():
        theirs = _alone(other, config)
        if theirs.quantize and (layer.kind == "transposed") != (other.kind == "transposed"):
            return Decision(False, f"tied to {other.name}, which has its rows where this has its columns")
        if not theirs.quantize:
            rule = f"tied to {layer.first}" if layer.first else f"tied to {other.name}, which stays: {theirs.rule}"
            return Decision(False, rule, theirs.deliberate)
    for part in layer.parts if own.quantize else ():
        theirs = _alone(part, config)
        if not theirs.quantize:
            return Decision(False, f"divided among layers of which {part.name} stays: {theirs.rule}", theirs.deliberate)
    blocksize = config.blocksize or 1
    if layer.parts and own.quantize and any(prod(each.shape) % blocksize for each in (layer, *layer.parts)):
        return Decision(False, _REARRANGED, deliberate=False)
    return own


def _alone(layer: Layer, config: QuantConfig) -> Decision:
    """The decision without regard to ties. The order of the rules is their precedence."""
    if layer.note:
        return Decision(False, layer.note)
    if not layer.dtype.is_floating_point:
        return Decision(False, f"{dtype_name(layer.dtype)}, not floating point")
    if len(layer.shape) < 2:
        return Decision(False, "not a matrix (norm, bias or scalar)")
    if prod(layer.shape) == 0:
        return Decision(False, "no elements")
    for name in (layer.module, layer.name, *layer.aliases):
        pattern = config.skips(name)
        if pattern is not None:
            return Decision(False, f"skip_modules: {pattern}")
    if layer.adapter:
        return Decision(False, "adapter")
    if layer.kind == "embedding":
        return Decision(False, "embedding")
    if layer.role == HEAD:
        return Decision(False, HEAD)
    if layer.role == ROUTER and len(layer.shape) == 2:
        return Decision(False, ROUTER)
    if layer.tied_by_model:
        return Decision(False, f"the model ties it to {layer.tied_by_model}")
    if layer.kept:
        return Decision(False, f"the model keeps it in float32: {layer.kept}")
    if layer.leaf.endswith("bias"):
        return Decision(False, "bias")
    if layer.dtype not in checks.COMPUTE_DTYPES:
        return Decision(False, f"{dtype_name(layer.dtype)} is not a 16/32-bit dtype", deliberate=False)
    made = {
        "linear": "linear weight",
        "transposed": "linear weight, transposed on the way",
        "experts": "stacked expert weights",
        "declared": f"weight of {layer.owner}",
    }
    if layer.kind in made:
        return Decision(True, made[layer.kind])
    left = {
        "convolution": "convolution",
        "rearranged": _REARRANGED,
    }
    rule = left.get(layer.kind, f"{layer.owner} is not a linear layer that fourbit knows")
    return Decision(False, rule, deliberate=False)


def left_modules(modules: Iterable[Layer], quantized: Sequence[Layer]) -> tuple[str, ...]:
    """Names for the list of what other readers must not make 4-bit: `llm_int8_skip_modules` of config.json.

    Args:
        modules: the layers of the model, tied ones included.
        quantized: the layers that are quantized.

    Only modules whose own `weight` is a matrix that stays are named: readers match a name as the beginning or
    the end of others, too. Where a name would so catch a quantized module it gets a "$", since names are taken as
    regular expressions from the beginning on, and as plain text at the end.
    """
    made = {layer.module for first in quantized for layer in (first, *first.tied, *first.parts)}
    names = [layer.module for layer in modules if layer.owns_matrix and layer.module not in made]
    forward, backward = sorted(made), sorted(name[::-1] for name in made)

    def catches(name: str) -> bool:
        return any(
            place < len(ordered) and ordered[place].startswith(start)
            for ordered, start in ((forward, name), (backward, name[::-1]))
            for place in (bisect_left(ordered, start),)
        )

    return tuple(f"{name}$" if catches(name) else name for name in dict.fromkeys([_ALWAYS_LISTED, *names]))
