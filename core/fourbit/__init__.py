"""fourbit: 4-bit blockwise weight quantization (NF4, FP4, double quantization) with pluggable backends.

>>> packed, state = fourbit.quantize_4bit(w, double_quant=True)
>>> y = fourbit.linear_4bit(x, packed, state)
>>> model = fourbit.quantize_model(model, fourbit.QuantConfig())
>>> fourbit.backends(), fourbit.explain(model.lm_head)

Importing it imports no backend, touches no GPU and reads no plugin; that happens at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fourbit.config import QuantConfig
from fourbit.dispatch import use_backend
from fourbit.functional import (
    NonFiniteError,
    dequantize_4bit,
    dequantize_blockwise,
    embedding_4bit,
    grouped_linear_4bit,
    linear_4bit,
    quantize_4bit,
    quantize_blockwise,
)
from fourbit.plugins import backends
from fourbit.registry import BackendInfo, BackendWarning, NoBackendError
from fourbit.state import QuantState
from fourbit.version import __version__

if TYPE_CHECKING:
    from fourbit import nn
    from fourbit.checkpoint.plan import plan
    from fourbit.explanation import explain
    from fourbit.nn.dequantize import dequantize_model
    from fourbit.nn.quantize import quantize_model
    from fourbit.plans import QuantPlan

# Imported at first use, so that `import fourbit` stays light.
_LAZY = {
    "QuantPlan": "fourbit.plans",
    "dequantize_model": "fourbit.nn.dequantize",
    "explain": "fourbit.explanation",
    "plan": "fourbit.checkpoint.plan",
    "quantize_model": "fourbit.nn.quantize",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "nn":
        return import_module("fourbit.nn")
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fourbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "BackendInfo",
    "BackendWarning",
    "NoBackendError",
    "NonFiniteError",
    "QuantConfig",
    "QuantPlan",
    "QuantState",
    "__version__",
    "backends",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_model",
    "embedding_4bit",
    "explain",
    "grouped_linear_4bit",
    "linear_4bit",
    "nn",
    "plan",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_model",
    "use_backend",
]
