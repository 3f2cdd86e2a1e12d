"""What transformers knows of a folder: its model without weights, and which of the model's tensors each one becomes."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from logging import CRITICAL
from typing import Any

from torch import nn

from fourbit.config import QuantConfig
from fourbit.hookspecs import hookimpl
from fourbit.plans.known import KnownModel, Target, without_weights

_NOT_ASKED = ("quantization_config", "auto_map", "use_pretrained_backbone")
"""Keys of a config.json that would have transformers ask for a quantizer, run code or fetch weights."""

_lock = threading.Lock()  # for what is set for the process while a model is built


@hookimpl
def fourbit_describe_model(config: dict[str, Any], names: tuple[str, ...]) -> KnownModel | None:
    """The model that `architectures` of config.json names, if transformers has that class itself."""
    classes = config.get("architectures")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return None
    with _quietly_offline():
        import transformers

        found = next((kind for name in classes if (kind := model_class(transformers, name)) is not None), None)
        if found is None:
            return None
        model = _build(transformers, found, _cleaned(config), names)
        return KnownModel(model, targets(model, names), f"{found.__name__} of transformers {transformers.__version__}")


@hookimpl
def fourbit_model_quantized(model: nn.Module, config: QuantConfig) -> None:
    """transformers' models in it are given fourbit's quantizer, which saves them."""
    found = _outermost(model)
    if found:
        from fourbit_transformers.quantizer import attach

        for part in found:
            attach(part, config)


@hookimpl
def fourbit_model_dequantized(model: nn.Module) -> None:
    """And have no quantizer any more."""
    found = _outermost(model)
    if found:
        from fourbit_transformers.quantizer import detach

        for part in found:
            detach(part)


def _outermost(model: nn.Module) -> list[nn.Module]:
    """transformers' models in it that are in no other one; none where transformers is not imported."""
    kind: type | None = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    found: dict[str, nn.Module] = {}
    if kind is None:
        return []
    part: nn.Module
    for name, part in model.named_modules():
        if isinstance(part, kind) and not any(name.startswith(f"{outer}.") or not outer for outer in found):
            found[name] = part
    return list(found.values())


def model_class(transformers: Any, name: str) -> Any:
    """transformers' model of that name, and nothing else that it has: a stranger names it. None if there is none."""
    kind = getattr(transformers, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None


def _build(transformers: Any, kind: Any, config: dict[str, Any], names: tuple[str, ...]) -> nn.Module:
    from transformers import initialization

    mapping = transformers.CONFIG_MAPPING
    model_type = config.get("model_type")
    wanted = mapping[model_type] if model_type in mapping else kind.config_class
    settings = wanted.from_dict(config)
    if not isinstance(settings, kind.config_class):
        raise ValueError(f"{kind.__name__} wants a {kind.config_class.__name__}, and model_type is {model_type!r}")
    # some models compute a schedule with torch.linspace and .item(), which meta tensors lack
    safe = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)
    with without_weights(names), safe():
        # "eager": other implementations may be kernels to fetch
        model: nn.Module = kind._from_config(settings, attn_implementation="eager")
    return model


def _cleaned(config: Any) -> Any:
    """config.json without what would reach for more than the model's shape, at any depth; infinities decoded."""
    if isinstance(config, dict):
        if set(config) == {"__float__"}:  # how transformers writes what JSON has no number for
            return float(config["__float__"])
        return {
            key: _cleaned(value)
            for key, value in config.items()
            if key not in _NOT_ASKED
            and not key.strip("_").startswith(("attn_implementation", "experts_implementation"))
        }
    return [_cleaned(value) for value in config] if isinstance(config, list) else config


def targets(model: Any, names: tuple[str, ...]) -> dict[str, Target]:
    """Which of the model's tensors each of a folder's becomes, by transformers' own renaming rules."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    tensors, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, tensors)
        if renamed not in tensors and name in tensors:  # as transformers does: it should not have been renamed
            renamed, pattern = rename_source_key(name, [], [], prefix, tensors)
        goals = [renamed]
        if pattern is not None:
            first, *others = by_pattern[pattern].target_patterns
            goals += [renamed.replace(first, other) for other in others]
        goals = [goal for goal in goals if goal in tensors]
        if goals:
            by_rows = pattern is not None and _keeps_rows(by_pattern[pattern])
            found[name] = Target(tuple(goals), pattern is not None, by_rows)
    return found


def _keeps_rows(converter: Any) -> bool:
    """Whether it only divides matrices between rows, or puts them below each other."""
    operations = [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations]
    return all(name in ("Chunk", "Split", "Concatenate") and dim == 0 for name, dim in operations)


@dataclass(frozen=True)
class _OfflineHere:
    """True on one thread: others may be downloading."""

    elsewhere: bool
    thread: int

    def __bool__(self) -> bool:
        return self.elsewhere or threading.get_ident() == self.thread


@contextmanager
def _quietly_offline() -> Iterator[None]:
    """No message of transformers' or while it is imported, and from this thread no request to the Hub, inside."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from huggingface_hub import constants
        from transformers.utils import logging

        offline, verbosity = constants.HF_HUB_OFFLINE, logging.get_verbosity()
        constants.HF_HUB_OFFLINE = _OfflineHere(offline, threading.get_ident())  # type: ignore[assignment]
        logging.set_verbosity(CRITICAL)
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            constants.HF_HUB_OFFLINE = offline
