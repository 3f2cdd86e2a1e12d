"""Quantizing a model folder tensor by tensor, so that the model never has to fit in memory.

The plan decides, `shards` lays the files out, `staging` makes the result appear all at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourbit.checkpoint import layout, shards, staging, writer
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.reader import Checkpoint
from fourbit.config import QuantConfig
from fourbit.functional import quantize_4bit, require_finite
from fourbit.plans import QuantPlan, plan
from fourbit.state import dtype_name

Progress = Callable[[str, int, int], None]
"""Called after each tensor with its name, the source bytes done so far, and all source bytes."""


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
        seconds: that it took.
    """

    source: Path
    destination: Path
    plan: QuantPlan
    files: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: float

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
            "seconds": self.seconds,
            "plan": self.plan.to_dict(),
        }


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    config: QuantConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
    max_shard_bytes: int = shards.MAX_SHARD_BYTES,
) -> QuantizeReport:
    """Write a 4-bit copy of the model folder `src` to `dst`, in the layout that bitsandbytes reads.

    Args:
        src: a folder of safetensors, or one .safetensors file; 16- or 32-bit.
        dst: the new folder. It is there only once it is complete.
        config: how to quantize; default QuantConfig().
        device: where to quantize.
        overwrite: replace `dst` if it is a model folder already; until the new one is complete it stays.
        progress: called after each tensor.
        max_shard_bytes: size at which the next weight file is begun.

    Raises:
        CheckpointError: the source is malformed or quantized already, or the destination cannot be written.
        NonFiniteError: a weight has NaN or Inf; its name and index are given, and nothing is left behind.
    """
    begin = time.perf_counter()
    config = config or QuantConfig()
    source, target = Path(src).expanduser().resolve(), Path(dst).expanduser().resolve()
    with Checkpoint(source) as checkpoint:
        require_unquantized(checkpoint)
        staging.check_destination(source, target, overwrite)
        model_config = checkpoint.config  # a broken config.json stops it here, before any work
        planned = plan(source, config, device=device)
        items = output_items(checkpoint, planned)
        metadata = {**checkpoint.metadata, "format": "pt"}
        layouts = shards.arrange(items, metadata, max_shard_bytes)
        staging.check_space(target.parent, sum(len(s.header) + item.nbytes for s in layouts for item in s.items))
        with staging.staged_folder(target, overwrite) as folder:
            _write_weights(checkpoint, folder, layouts, planned, torch.device(device), progress)
            copied: list[str] = []
            left_out: list[str] = []
            if source.is_dir():
                copied, left_out = writer.copy_other_files(source, folder)
                used = {file.name for file in checkpoint.files} | {layout.INDEX_FILE}
                left_out = [name for name in left_out if name not in used]
            entry = quantization_config(planned)
            writer.write_json(folder / layout.CONFIG_FILE, {**model_config, "quantization_config": entry})
            _check_written(folder, items)
    return QuantizeReport(
        *(source, target, planned, tuple(s.file for s in layouts), checkpoint.nbytes),
        *(sum(item.nbytes for item in items), tuple(copied), tuple(left_out), time.perf_counter() - begin),
    )


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


def _write_weights(
    checkpoint: Checkpoint,
    folder: Path,
    layouts: list[shards.Shard],
    planned: QuantPlan,
    device: torch.device,
    progress: Progress | None,
) -> None:
    done, total = 0, checkpoint.nbytes
    for shard in layouts:
        with writer.atomic_file(folder / shard.file) as stream:
            shard_writer = writer.ShardWriter(stream, shard)
            for item in shard.items:
                tensor = checkpoint.read(item.source)
                shard_writer.write(item, _converted(tensor, item, planned, device))
                done += checkpoint.info(item.source).nbytes
                if progress is not None:
                    progress(item.source, done, total)
    if len(layouts) > 1:
        writer.write_json(folder / layout.INDEX_FILE, shards.index(layouts))


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
    # Readers make every nn.Linear 4-bit but these. A tied head has no tensor of its own, so it is always
    # listed; embeddings and routers are no nn.Linear in most models, and listing them does no harm.
    skipped = [t.module for t in planned.skipped if len(t.shape) == 2 and t.module]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": config.quant_type,
        "bnb_4bit_use_double_quant": config.double_quant,
        "bnb_4bit_compute_dtype": dtype_name(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(dict.fromkeys(["lm_head", *skipped])),
    }


def _check_written(folder: Path, items: list[shards.Item]) -> None:
    """Open the result as a stranger would, and compare names, dtypes and shapes with the layout."""
    with Checkpoint(folder) as written:
        want = {part.name: (part.dtype, part.shape) for item in items for part in item.parts}
        have = {name: (info.dtype, info.shape) for name, info in written.entries.items()}
        if want != have:
            wrong = min(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))
            raise CheckpointError(f"{folder}: reading back what was written failed at {wrong!r}")
