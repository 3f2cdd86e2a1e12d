"""diffusers: its models, built without weights, say which of a folder's tensors are linear layers."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import Any

from torch import nn

from fourbit.config import QuantConfig
from fourbit.hookspecs import hookimpl
from fourbit.plans.known import KnownModel, Target, without_weights

_NOT_ASKED = ("auto_map", "quantization_config")
"""Keys of a config.json that have nothing to do with the model's shape."""


@hookimpl
def fourbit_describe_model(config: dict[str, Any], names: tuple[str, ...]) -> KnownModel | None:
    """The model that `_class_name` of config.json names, if diffusers has that class itself."""
    name = config.get("_class_name")
    if not isinstance(name, str):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers: Any = import_module("diffusers")  # it is untyped, and need not be there
        kind = _model_class(diffusers, name)
    if kind is None:
        return None
    with without_weights(names):
        model: nn.Module = kind.from_config({key: value for key, value in config.items() if key not in _NOT_ASKED})
    from fourbit_diffusers.loading import renamed

    tensors, new = model.state_dict(), renamed(model, names)
    targets = {each: Target((new[each],)) for each in names if new[each] in tensors}
    return KnownModel(model, targets, f"{name} of diffusers {diffusers.__version__}")


@hookimpl
def fourbit_model_quantized(model: nn.Module, config: QuantConfig) -> None:
    """diffusers' models in it are given fourbit's quantizer, which saves them."""
    for part in _models(model):
        from fourbit_diffusers.quantizer import attach

        attach(part, config)


@hookimpl
def fourbit_model_dequantized(model: nn.Module) -> None:
    """And have no quantizer any more."""
    for part in _models(model):
        from fourbit_diffusers.quantizer import detach

        detach(part)


def _models(model: nn.Module) -> list[nn.Module]:
    """diffusers' models in it; none where diffusers is not imported."""
    kind: type | None = getattr(sys.modules.get("diffusers.models.modeling_utils"), "ModelMixin", None)
    return [part for part in model.modules() if kind is not None and isinstance(part, kind)]


def _model_class(diffusers: Any, name: str) -> Any:
    kind = getattr(diffusers, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin) else None
