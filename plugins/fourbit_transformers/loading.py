"""`load(folder)`: `from_pretrained` for a folder whose architecture transformers has, and whoever packed it."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from typing import Any

import torch
import transformers

from fourbit.checkpoint.reader import Checkpoint
from fourbit.config import as_compute_dtype
from fourbit_transformers.config import FourbitConfig

_lock = threading.Lock()
"""transformers sets the default dtype of the process while it builds a model."""


def load(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype | str | None = None,
    **more: Any,
) -> Any:
    """A transformers model from a folder with 4-bit weights, fourbit's or bitsandbytes', or plain ones.

    The model's class is the one that config.json names; no code of the folder is run. It is in eval mode, on
    `device`. `compute_dtype` None follows the input's dtype. `more` goes to `from_pretrained`.

    Raises CheckpointError or ValueError, naming the tensor, if folder and model do not fit.
    """
    compute_dtype = as_compute_dtype(compute_dtype)
    with Checkpoint(folder) as checkpoint:
        place, config, packed = checkpoint.folder, _config(checkpoint), bool(checkpoint.quantized())
    if packed:
        entry = getattr(config, "quantization_config", None)
        quantization = FourbitConfig.from_dict(entry if isinstance(entry, dict) and entry else {})
        quantization.quant = _with_compute_dtype(quantization, compute_dtype)
        config.quantization_config = {"quant_method": quantization.quant_method, **quantization.quant.to_dict()}
    more.setdefault("device_map", {"": device})
    with _lock:
        model, info = _class(config).from_pretrained(place, config=config, output_loading_info=True, **more)
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(f"{place} lacks {names[0]!r}{rest}, which {type(model).__name__} has")
    return model


def _with_compute_dtype(found: FourbitConfig, compute_dtype: torch.dtype | None) -> Any:
    return replace(found.quant, compute_dtype=compute_dtype)


def _config(checkpoint: Checkpoint) -> Any:
    """The model's configuration. Code in the folder is never run, and never asked about."""
    found = checkpoint.config  # read by fourbit first: it follows no link out of the folder
    kind = found.get("model_type")
    known = isinstance(kind, str) and kind in transformers.CONFIG_MAPPING
    if "auto_map" in found and not known:
        raise ValueError(
            f"{checkpoint.folder} needs code of its own (auto_map in its config.json), and transformers has no model"
            f" {kind!r}: fourbit runs no code that comes with a folder. Load it with transformers itself, with"
            " trust_remote_code=True, if you trust it"
        )
    return transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)


def _class(config: Any) -> Any:
    names = getattr(config, "architectures", None) or []
    for name in names:
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    raise ValueError(f"config.json names no architecture that transformers has: {names}")
