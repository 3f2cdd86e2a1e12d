"""plan: what quantizing a model or a folder would do."""

from __future__ import annotations

import os

import torch
from torch import nn

from fourbit.checkpoint.reader import Checkpoint
from fourbit.checkpoint.walk import describe_folder
from fourbit.config import QuantConfig
from fourbit.nn.quantize import plan_model
from fourbit.plans import QuantPlan, planned


def plan(
    model_or_folder: nn.Module | Checkpoint | str | os.PathLike[str],
    config: QuantConfig | None = None,
    *,
    device: torch.device | str | None = None,
) -> QuantPlan:
    """What quantizing a model would do, without doing it.

    Args:
        model_or_folder: an nn.Module (also on the meta device), or a folder of safetensors, of which only the
            headers are read; an open Checkpoint has read them already. Where its config.json names a class that a
            plugin knows (transformers', say), that model says what its tensors are; else their names do.
            `described_by` of the plan tells which.
        config: default QuantConfig().
        device: where it would be quantized, for the default blocksize; None: where the model is, or the CPU.

    Raises OSError or ValueError for a folder that cannot be read.
    """
    if isinstance(model_or_folder, nn.Module):
        return plan_model(model_or_folder, config, device)
    if isinstance(model_or_folder, Checkpoint):
        checkpoint, source = model_or_folder, str(model_or_folder.path)
    else:
        checkpoint, source = Checkpoint(model_or_folder), str(model_or_folder)
    found = describe_folder(checkpoint)
    return planned(found.layers, found.modules, config, device or "cpu", source, found.described_by)
