"""The walk over a model, in memory or on the meta device: what each of its parameters is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fourbit.nn.packed import PackedModule, class_for
from fourbit.nn.storage import STORAGE
from fourbit.plans.layer import HEAD, ROUTER, ROUTERS, Layer, is_experts, is_head

_FOREIGN = ("bitsandbytes.", "torchao.")
_KEPT = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
_ADAPTED = ("base_layer", "original_module", "base_model", "model", "lora_model")
"""Where peft's modules hold what they adapt; all else in them is the adapter's."""

_ROUTER = re.compile(r"(Router|Gate|Gating)$")
_MIXTURE = re.compile(r"(MoE|Moe|MOE|MoeBlock|MoEBlock|MixtureOfExperts)$")
"""Ends of the names of classes: of routers, where there are experts beside them, and of what has both."""


@dataclass(frozen=True)
class _Place:
    """A module in the walk; `path`: its name without what adapters put into it; `role`, `note`: of all within."""

    name: str
    path: str
    module: nn.Module
    role: str = ""
    adapter: bool = False
    note: str = ""


def describe_model(model: nn.Module) -> list[Layer]:
    """A Layer for each parameter, in the order of `named_parameters`; tied ones each have theirs."""
    kept = _kept_in_float32(model)
    root = _Place("", "", model, note=_note_in("", model))
    places = list(_walk(root, _output_heads(model), set()))
    tied = _tied_by_model(places)
    found: list[Layer] = []
    sharing: dict[int, list[int]] = {}
    for place in places:
        module, kind_of_module = place.module, type(place.module)
        adapter = place.adapter or _is_tuner(module)
        role = place.role or (HEAD if is_head(place.path) else "")
        for leaf, tensor in module._parameters.items():
            if tensor is None:
                continue
            name = f"{place.name}.{leaf}" if place.name else leaf
            note = place.note
            if isinstance(module, PackedModule) and leaf in STORAGE:
                note = "4-bit already"
            elif kind_of_module.__module__.startswith(_FOREIGN):
                note = f"quantized already, by {kind_of_module.__module__.split('.')[0]}"
            sharing.setdefault(id(tensor), []).append(len(found))
            found.append(
                Layer(
                    name=name,
                    module=place.name,
                    leaf=leaf,
                    shape=tuple(tensor.shape),
                    dtype=tensor.dtype,
                    nbytes=tensor.nbytes,
                    kind=_kind(module, leaf, name, tensor),
                    role=role,
                    owner=kind_of_module.__name__,
                    note=note,
                    adapter=adapter,
                    kept=next((p for p, pattern in kept if pattern.search(f"{place.path}.{leaf}")), ""),
                    tied_by_model=tied.get(f"{place.path}.{leaf}", ""),
                )
            )
    for group in sharing.values():
        if len(group) > 1:
            members = [found[i] for i in group]
            for i in group:
                found[i] = replace(found[i], tied=tuple(m for m in members if m is not found[i]))
            for i in group[1:]:
                found[i] = replace(found[i], first=members[0].name, nbytes=0)
    return found


def _walk(place: _Place, heads: set[int], seen: set[int]) -> Iterator[_Place]:
    """Every module once, in the order of `named_modules`."""
    seen.add(id(place.module))
    yield place
    tuner = _is_tuner(place.module)
    for key, child in place.module._modules.items():
        if child is None or id(child) in seen:
            continue
        adapted = tuner and key in _ADAPTED
        yield from _walk(
            _Place(
                name=f"{place.name}.{key}" if place.name else key,
                path=place.path if adapted else f"{place.path}.{key}" if place.path else key,
                module=child,
                role=place.role or (HEAD if id(child) in heads else _role_in(place.module, key, child)),
                adapter=place.adapter or (tuner and not adapted),
                note=_note_in(place.note, child),
            ),
            heads,
            seen,
        )


def _note_in(note: str, module: nn.Module) -> str:
    """Why all within `module` stays as it is, but for what says otherwise; `note`: what was said of its parent.

    sentence-transformers writes and reads its modules' weights itself and knows of no others; but for the transformer,
    which is for transformers to save.
    """
    for kind in type(module).__mro__:
        if kind.__name__ == "PreTrainedModel":
            return ""
        if kind.__module__.startswith("sentence_transformers."):
            return f"of the module {type(module).__name__}, which sentence-transformers loads itself"
    return note


def _role_in(parent: nn.Module, key: str, child: nn.Module) -> str:
    """ROUTER, if that is what the child `key` of `parent` is, or "": a gated product's gate has no experts beside."""
    named = key in ROUTERS or _ROUTER.search(type(child).__name__)
    return ROUTER if named and _has_experts(parent) else ""


def _has_experts(module: nn.Module) -> bool:
    """Whether the module's own children and parameters, or its class, are those of a mixture of experts."""
    if _MIXTURE.search(type(module).__name__):
        return True
    parts = ((key, type(child).__name__) for key, child in module._modules.items() if key not in ROUTERS)
    if any("expert" in key.lower() or "Expert" in kind for key, kind in parts):
        return True
    return any(p is not None and is_experts(key, tuple(p.shape)) for key, p in module._parameters.items())


def _is_tuner(module: nn.Module) -> bool:
    """Whether it is peft's, or has the marks of its layers."""
    kind = type(module)
    if kind.__module__.startswith("torch.nn."):
        return False  # most modules of most models
    return hasattr(kind, "adapter_layer_names") or any(c.__module__.startswith("peft.") for c in kind.__mro__)


def _output_heads(model: nn.Module) -> set[int]:
    """Ids of transformers' output embeddings, of the model and of those that it is composed of."""
    found = set()
    for module in model.modules():
        if not callable(getattr(type(module), "get_output_embeddings", None)):
            continue
        try:
            found.add(id(module.get_output_embeddings()))  # type: ignore[operator]
        except (NotImplementedError, AttributeError):
            pass  # it has the method and no head
    return found - {id(None)}


def _tied_by_model(places: list[_Place]) -> dict[str, str]:
    """Paths of the tensors that transformers' models tie, each with that of another one."""
    found: dict[str, str] = {}
    for place in places:
        pairs = place.module.__dict__.get("all_tied_weights_keys")
        for target, source in pairs.items() if isinstance(pairs, Mapping) else ():
            one, other = (f"{place.path}.{name}" if place.path else str(name) for name in (target, source))
            found.setdefault(one, other)
            found.setdefault(other, one)
    return found


def _kept_in_float32(model: nn.Module) -> list[tuple[str, re.Pattern[str]]]:
    """The patterns of tensor names that transformers' models keep in float32, as they search for them."""
    patterns: dict[str, re.Pattern[str]] = {}
    for module in model.modules():
        for attribute in _KEPT:
            names = module.__dict__.get(attribute, getattr(type(module), attribute, None))
            for name in names if isinstance(names, (list, tuple, set)) else ():
                try:
                    patterns.setdefault(name, re.compile(name.replace("*", ".*")))
                except re.error:
                    patterns.setdefault(name, re.compile(re.escape(name)))
    return sorted(patterns.items(), key=lambda item: item[0])


def _kind(module: nn.Module, leaf: str, name: str, tensor: Tensor) -> str:
    """See `Layer.kind`. Subclasses of nn.Linear are left: what they compute is their own, and no reader swaps them."""
    made = class_for(type(module)) if leaf == "weight" else None
    if made is not None:
        return made.kind
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if is_experts(f"{name}.{type(module).__name__}.{leaf}", tuple(tensor.shape)):
        return "experts"
    return "other"
