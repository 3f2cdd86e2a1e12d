"""transformers: load a 4-bit folder into a model. `fourbit_transformers.load(folder)`."""

from fourbit_transformers.loading import load

__all__ = ["load"]
