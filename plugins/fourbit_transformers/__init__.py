"""transformers: load a 4-bit folder into a model. `fourbit.plugins.transformers.load(folder)`."""

from fourbit.plugins.transformers.loading import load

__all__ = ["load"]
