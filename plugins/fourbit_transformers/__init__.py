"""transformers: load a 4-bit folder into a model. `fourbit_transformers.load(folder)`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fourbit_transformers.loading import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module 'fourbit_transformers' has no attribute {name!r}")
    from fourbit_transformers.loading import load  # not above: `fourbit --help` imports the demo's command alone

    return load
