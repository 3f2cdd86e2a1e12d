"""bitsandbytes, where it is installed: the peer that most users have."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from typing import Any

import torch


def load() -> Any:
    """The module, or None where it cannot be loaded; without what it prints about a package that it misses."""
    try:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        with contextlib.redirect_stderr(io.StringIO()):
            import bitsandbytes
    except Exception as error:  # whatever keeps it from loading, the tables go on without it
        print(f"without bitsandbytes: {error}", file=sys.stderr)
        return None
    return bitsandbytes


def linear(plain: torch.nn.Linear, compute_dtype: torch.dtype) -> torch.nn.Module | None:
    """Its Linear4bit (NF4) of a layer without bias, on the layer's device, in training mode; None without it.

    Its evaluation mode packs the weight anew on a CPU, for good.
    """
    module = load()
    if module is None:
        return None
    sizes = (plain.in_features, plain.out_features)
    layer = module.nn.Linear4bit(*sizes, bias=False, compute_dtype=compute_dtype, quant_type="nf4")
    layer.weight = module.nn.Params4bit(plain.weight.detach().cpu().clone(), requires_grad=False, quant_type="nf4")
    return layer.to(plain.weight.device)
