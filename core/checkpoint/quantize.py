"""Quantizing a model folder tensor by tensor, so that the model never has to fit in memory.

The plan decides and `shards` lays the files out; `build` writes them, so that it can be interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourbit import codebooks
from fourbit.checkpoint import shards
from fourbit.checkpoint.build import Job, Progress, build
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.reader import Checkpoint
from fourbit.config import QuantConfig
from fourbit.functional import quantize_4bit, require_finite
from fourbit.plans import QuantPlan, plan
from fourbit.state import dtype_name


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_checkpoint` did.

    Attributes:
        source, destination: the folders.
        plan: which tensors were quantized, which were not, and why.
        files: names of the weight files written.
        bytes_before: of the source's tensors.
        bytes_after: of the tensors written, code tables and metadata included.
        copied: other files carried over; left_out: files with weights in other forms, which were not.
        resumed_bytes: of the source's tensors, that an earlier run had done.
        seconds: that it took.
        leftovers: folders beside the new one that runs left and that are not known to be of no use.
    """

    source: Path
    destination: Path
    plan: QuantPlan
    files: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    resumed_bytes: int
    seconds: float
    leftovers: tuple[Path, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "source": str(self.source),
            "destination": str(self.destination),
            "files": list(self.files),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "copied": list(self.copied),
            "left_out": list(self.left_out),
            "resumed_bytes": self.resumed_bytes,
            "seconds": self.seconds,
            "leftovers": [str(path) for path in self.leftovers],
            "plan": self.plan.to_dict(),
        }


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    config: QuantConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    max_shard_bytes: int = shards.MAX_SHARD_BYTES,
) -> QuantizeReport:
    """Write a 4-bit copy of the model folder `src` to `dst`, in the layout that bitsandbytes reads.

    Args:
        src: a folder of safetensors, or one .safetensors file; 16- or 32-bit.
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
        CheckpointError: the source is malformed or quantized already or changes meanwhile, the destination
            exists or cannot be written, or there is an unfinished folder and neither `resume` nor `overwrite`.
        NonFiniteError: a weight has NaN or Inf; its name and index are given, and nothing is left behind.
        ValueError: both `overwrite` and `resume`.
    """
    begin = time.perf_counter()
    if overwrite and resume:
        raise ValueError("quantize_checkpoint: overwrite begins afresh and resume does not: want one of them")
    config = config or QuantConfig()
    source, target = Path(src).expanduser().resolve(), Path(dst).expanduser().resolve()
    with Checkpoint(source) as checkpoint:
        require_unquantized(checkpoint)
        model_config = checkpoint.config  # a broken config.json stops it here, before any work
        planned = plan(source, config, device=device)
        items = output_items(checkpoint, planned)
        where = torch.device(device)
        job = Job(
            checkpoint=checkpoint,
            target=target,
            layouts=shards.arrange(items, {**checkpoint.metadata, "format": "pt"}, max_shard_bytes),
            settings=_settings(planned),
            config={**model_config, "quantization_config": quantization_config(planned)},
            read=lambda item: checkpoint.read(item.source),
            convert=lambda item, tensor: _converted(tensor, item, planned, where),
            source_bytes=lambda item: checkpoint.info(item.source).nbytes,
        )
        built = build(job, overwrite=overwrite, resume=resume, progress=progress)
    return QuantizeReport(
        *(source, target, planned, tuple(s.file for s in job.layouts), checkpoint.nbytes),
        *(sum(item.nbytes for item in items), built.copied, built.left_out, built.resumed_bytes),
        time.perf_counter() - begin,
        built.leftovers,
    )


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


def require_unquantized(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if the source is quantized, by whomever."""
    first = next(iter(checkpoint.quantized()), None)
    if first is not None:
        raise CheckpointError(f"{checkpoint.path} is quantized already: {first} is a 4-bit weight")
    entry = checkpoint.quantization_config()
    if entry:
        method = entry.get("quant_method", "an unnamed method")
        raise CheckpointError(f"{checkpoint.path} is quantized already: its config.json says {method}")


def output_items(checkpoint: Checkpoint, planned: QuantPlan) -> list[shards.Item]:
    """What each tensor of the source becomes, in the source's order; sizes are exact before anything is read."""
    kind, double = planned.config.quant_type, planned.config.double_quant
    items = [
        shards.quantized_item(t.name, t.shape, t.dtype, kind, planned.blocksize, double)
        if t.action == "quantize"
        else shards.plain_item(checkpoint.info(t.name))
        for t in planned.tensors
    ]
    names: set[str] = set()
    for part in (part for item in items for part in item.parts):
        if part.name in names:
            raise CheckpointError(f"{checkpoint.path}: the name {part.name!r} is needed for a 4-bit weight's state")
        names.add(part.name)
    return items


def _converted(tensor: Tensor, item: shards.Item, planned: QuantPlan, device: torch.device) -> Mapping[str, Tensor]:
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
    config = planned.config
    dtype = config.compute_dtype or next((t.dtype for t in planned.quantized), torch.bfloat16)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": config.quant_type,
        "bnb_4bit_use_double_quant": config.double_quant,
        "bnb_4bit_compute_dtype": dtype_name(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(planned.left_modules),
    }
