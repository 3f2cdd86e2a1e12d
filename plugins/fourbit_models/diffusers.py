"""diffusers: its models, built without weights, say which of a folder's tensors are linear layers."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

from torch import nn

from fourbit.hookspecs import hookimpl
from fourbit.plans.known import KnownModel, Target, without_weights


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
        model: nn.Module = kind.from_config({key: value for key, value in config.items() if key != "auto_map"})
    tensors = model.state_dict()
    targets = {each: Target((each,)) for each in names if each in tensors}
    return KnownModel(model, targets, f"{name} of diffusers {diffusers.__version__}")


def _model_class(diffusers: Any, name: str) -> Any:
    kind = getattr(diffusers, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin) else None
