"""Quantizing a model folder tensor by tensor, so that the model never has to fit in memory.

The plan decides and `file_layout` lays the files out; `build` writes them, so that it can be interrupted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourbit import codebooks
from fourbit.checkpoint.build import build
from fourbit.checkpoint.conversion import Job, Progress, Report, Request
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.file_layout import MAX_SHARD_BYTES, Item, plain_item, quantized_item
from fourbit.checkpoint.foreign import require_unquantized
from fourbit.checkpoint.plan import plan
from fourbit.checkpoint.reader import Checkpoint
from fourbit.checkpoint.source import resolved
from fourbit.config import QuantConfig, as_bitsandbytes
from fourbit.functional import quantize_4bit, require_finite
from fourbit.plans import QuantPlan

MOST_RULES = 6
"""Rules that the error lists where nothing is quantized."""


@dataclass(frozen=True)
class QuantizeReport(Report):
    """What `quantize_checkpoint` did: all that a `Report` has, and

    Attributes:
        plan: which tensors were quantized, which were not, and why.
    """

    plan: QuantPlan

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**self._as_json(), "plan": self.plan.to_dict()}


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    config: QuantConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> QuantizeReport:
    """Write a 4-bit copy of the model folder `src` to `dst`, in the layout that bitsandbytes reads.

    Args:
        src: a folder of safetensors, or one .safetensors file; 16- or 32-bit. Also a repository in the Hub's cache,
            or the Hub's name of a model that is in it; nothing is fetched.
        dst: the new folder. It is there only once it is complete.
        config: how to quantize; default QuantConfig().
        device: where to quantize.
        overwrite: replace `dst` if it is a model folder already, with nothing else in it; until the new one is
            complete it stays, and if it has changed by then it stays, too. Begin afresh if there is an unfinished
            folder.
        resume: continue an unfinished folder if there is one; the bytes are those of an uninterrupted run. A
            `dst` that such a run has finished is left as it is, if every hash is still right.
        progress: called after each tensor.
        max_shard_bytes: size at which the next weight file is begun.

    Raises:
        CheckpointError: the source is malformed, an adapter, quantized already, or has nothing to quantize, or it
            changes meanwhile; the destination exists or cannot be written, or there is an unfinished folder and
            neither `resume` nor `overwrite`.
        NonFiniteError: a weight has NaN or Inf; its name and index are given, and nothing is left behind.
        ValueError: both `overwrite` and `resume`.
    """
    request = Request("quantize_checkpoint", dst, overwrite, resume, progress, max_shard_bytes)
    config = config or QuantConfig()
    source = resolved(src)
    with Checkpoint(source) as checkpoint:
        require_unquantized(checkpoint)
        model_config = checkpoint.config  # a broken config.json stops it here, before any work
        planned = plan(checkpoint, config, device=device)
        require_work(planned)
        where = torch.device(device)
        job = Job(
            request,
            checkpoint,
            items=output_items(checkpoint, planned),
            settings=_settings(planned),
            config={**model_config, "quantization_config": quantization_config(planned)},
            read=lambda item: checkpoint.read(item.source),
            convert=lambda item, tensor: _converted(tensor, item, planned, where),
        )
        return QuantizeReport(**vars(build(job)), plan=planned)


def _settings(planned: QuantPlan) -> dict[str, Any]:
    """All that determines the output beside the source, as JSON values."""
    config = planned.config
    code = codebooks.get(config.quant_type)
    return {
        "quant_type": code.name,
        "codebook": list(code.values),
        "blocksize": planned.blocksize,
        "double_quant": config.double_quant,
        "quantization_config": quantization_config(planned),
    }


def require_work(planned: QuantPlan) -> None:
    """Raise CheckpointError if the plan quantizes nothing: it is not what anybody wants a copy for.

    It is the wrong folder then (an encoder of convolutions, half of a model), or skip_modules names all there is; and
    config.json must not say that a model is in 4 bits that is not.
    """
    if planned.quantized:
        return
    rules = Counter(t.rule for t in planned.skipped)
    why = "; ".join(f"{count} {rule}" for rule, count in rules.most_common(MOST_RULES))
    raise CheckpointError(
        f"{planned.source}: no tensor is quantized, so that a copy would be the same model again. Tensors by the rule"
        f" that leaves them as they are: {why or 'there is none'}"
    )


def output_items(checkpoint: Checkpoint, planned: QuantPlan) -> list[Item]:
    """What each tensor of the source becomes, in the source's order; sizes are exact before anything is read."""
    kind, double = planned.config.quant_type, planned.config.double_quant
    items = [
        quantized_item(t.name, t.shape, t.dtype, kind, planned.blocksize, double)
        if t.action == "quantize"
        else plain_item(checkpoint.info(t.name))
        for t in planned.tensors
    ]
    names: set[str] = set()
    for part in (part for item in items for part in item.parts):
        if part.name in names:
            raise CheckpointError(f"{checkpoint.path}: the name {part.name!r} is needed for a 4-bit weight's state")
        names.add(part.name)
    return items


def _converted(tensor: Tensor, item: Item, planned: QuantPlan, device: torch.device) -> Mapping[str, Tensor]:
    """The tensors of one item, by name, on the CPU."""
    if not item.quantize:
        return {item.source: tensor}
    weight = tensor.to(device)
    require_finite(weight, item.source)
    config = planned.config
    packed, state = quantize_4bit(
        weight, quant_type=config.quant_type, blocksize=planned.blocksize, double_quant=config.double_quant
    )
    parts = {item.source: packed, **state.to_state_dict(item.source + ".")}
    return {name: part.cpu() for name, part in parts.items()}


def quantization_config(planned: QuantPlan) -> dict[str, Any]:
    """The entry of config.json that makes transformers, peft and vLLM read the folder."""
    dtype = planned.config.compute_dtype or next((t.dtype for t in planned.quantized), torch.bfloat16)
    return as_bitsandbytes(planned.config, dtype, planned.left_modules)
