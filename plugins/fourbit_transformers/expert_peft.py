"""Registration of `expert_lora` with peft: now, or when it is imported, which takes seconds and fourbit never does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

from torch import nn


def register() -> None:
    """Have peft's LoRA find stacked experts in 4 bits. Does nothing the second time."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _OnceImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnceImported())


def adapt_present(model: nn.Module) -> None:
    """The same for adapters that were on the model before its experts were in 4 bits."""
    if "peft" in sys.modules:
        from fourbit_transformers.expert_lora import adapt

        for module in list(model.modules()):
            adapt(module)


def _register() -> None:
    try:
        from fourbit_transformers import expert_lora
    except ImportError:
        return  # a peft of before `target_parameters`; to import that one must not fail
    expert_lora.register()


class _OnceImported(MetaPathFinder):
    """Finds peft as all others do, and registers when it has been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        """peft's own specification, and nothing for other names."""
        if name != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for finder in others if (s := finder.find_spec(name, path, target)) is not None), None)
        loader: Any = spec.loader if spec is not None else None
        if loader is None:
            return spec
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _register()

        loader.exec_module = exec_module
        return spec
