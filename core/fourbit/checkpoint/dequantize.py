"""Dequantizing a 4-bit model folder tensor by tensor: `quantize` backwards, with the same guarantees."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourbit.checkpoint import shards
from fourbit.checkpoint.build import Job, Progress, build
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.reader import Checkpoint
from fourbit.checkpoint.source import resolved
from fourbit.functional import NonFiniteError, dequantize_4bit, require_finite
from fourbit.state import QuantState, dtype_name


@dataclass(frozen=True)
class DequantizeReport:
    """What `dequantize_checkpoint` did.

    Attributes:
        source, destination: the folders.
        dequantized: names of the weights that were in 4 bits.
        carried: names of the other tensors, which are the same bytes as before.
        files: names of the weight files written.
        bytes_before: of the source's tensors, code tables and metadata included.
        bytes_after: of the tensors written.
        copied: other files carried over.
        left_out: files with weights in other forms or of other models, which were not.
        skipped: what else was not, with the reason: links out of the source, pipes, devices.
        resumed_bytes: of the source's tensors, that an earlier run had done.
        seconds: that it took.
        leftovers: folders beside the new one that runs left and that are not known to be of no use.
    """

    source: Path
    destination: Path
    dequantized: tuple[str, ...]
    carried: tuple[str, ...]
    files: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    skipped: dict[str, str]
    resumed_bytes: int
    seconds: float
    leftovers: tuple[Path, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "source": str(self.source),
            "destination": str(self.destination),
            "dequantized": list(self.dequantized),
            "carried": list(self.carried),
            "files": list(self.files),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "copied": list(self.copied),
            "left_out": list(self.left_out),
            "skipped": self.skipped,
            "resumed_bytes": self.resumed_bytes,
            "seconds": self.seconds,
            "leftovers": [str(path) for path in self.leftovers],
        }


def dequantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    max_shard_bytes: int = shards.MAX_SHARD_BYTES,
) -> DequantizeReport:
    """Write a copy of the 4-bit model folder `src` to `dst` whose weights are plain 16- or 32-bit tensors.

    `quantization_config` leaves config.json; other files are carried over. Reading,
    dequantizing and writing overlap; in memory are a few weights at a time.

    Args:
        src: a folder that fourbit or bitsandbytes wrote, or one .safetensors file.
        dst: the new folder. It is there only once it is complete.
        dtype: float32, bfloat16 or float16 for the 4-bit weights; None: for each the one that was quantized.
            Other tensors keep theirs.
        device: where to dequantize.
        overwrite: replace `dst` if it is a model folder already, with nothing else in it; until the new one is
            complete it stays, and if it has changed by then it stays, too. Begin afresh if there is an unfinished
            folder.
        resume: continue an unfinished folder if there is one; the bytes are those of an uninterrupted run.
        progress: called after each tensor.
        max_shard_bytes: size at which the next weight file is begun.

    Raises:
        CheckpointError: the source is malformed or has no 4-bit weight, the destination exists or cannot
            be written, or there is an unfinished folder and neither `resume` nor `overwrite`.
        NonFiniteError: a weight dequantizes to NaN or Inf, or overflows `dtype`; nothing is left behind.
        ValueError: both `overwrite` and `resume`.
    """
    begin = time.perf_counter()
    if overwrite and resume:
        raise ValueError("dequantize_checkpoint: overwrite begins afresh and resume does not: want one of them")
    source, target = resolved(src), Path(dst).expanduser().resolve()
    with Checkpoint(source) as checkpoint:
        require_quantized(checkpoint)
        config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        items = output_items(checkpoint, dtype)
        where = torch.device(device)
        job = Job(
            checkpoint=checkpoint,
            target=target,
            layouts=shards.arrange(items, {**checkpoint.metadata, "format": "pt"}, max_shard_bytes, checkpoint.stem),
            settings={"dequantize": "the stored types" if dtype is None else dtype_name(dtype)},
            config=config or None,
            read=lambda item: _read(checkpoint, item),
            convert=lambda item, content: {item.source: _plain(item, content, where)},
            source_bytes=lambda item: _source_bytes(checkpoint, item),
        )
        built = build(job, overwrite=overwrite, resume=resume, progress=progress)
        quantized = checkpoint.quantized()
    names = [item.source for item in items]
    return DequantizeReport(
        source=source,
        destination=target,
        dequantized=tuple(name for name in names if name in quantized),
        carried=tuple(name for name in names if name not in quantized),
        files=tuple(shard.file for shard in job.layouts),
        bytes_before=checkpoint.nbytes,
        bytes_after=sum(item.nbytes for item in items),
        copied=built.others.carried,
        left_out=built.others.left_out,
        skipped=built.others.skipped,
        resumed_bytes=built.resumed_bytes,
        seconds=time.perf_counter() - begin,
        leftovers=built.leftovers,
    )


def require_quantized(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if the source has no 4-bit weight in a layout that is read here."""
    if checkpoint.quantized():
        return
    method = checkpoint.quantization_config().get("quant_method")
    said = f"; its config.json says {method}" if method else ""
    raise CheckpointError(f"{checkpoint.path} has no 4-bit weight in the bitsandbytes layout{said}")


def output_items(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> list[shards.Item]:
    """What each weight of the source becomes, in the source's order; only headers and states are read."""
    companions = checkpoint.companions()
    items = []
    for name, info in checkpoint.entries.items():
        if name in companions:
            continue
        if name not in checkpoint.quantized():
            items.append(shards.plain_item(info))
            continue
        state = checkpoint.state(name)
        checkpoint.check_packed(name, state)
        kind = dtype or state.dtype
        part = shards.Part(name, kind, tuple(state.shape), state.numel * kind.itemsize)
        items.append(shards.Item(name, False, (part,)))
    return items


Content = Tensor | tuple[Tensor, QuantState]


def _source_bytes(checkpoint: Checkpoint, item: shards.Item) -> int:
    parts = (item.source, *checkpoint.quantized().get(item.source, ()))
    return sum(checkpoint.info(name).nbytes for name in parts)


def _read(checkpoint: Checkpoint, item: shards.Item) -> Content:
    if item.source in checkpoint.quantized():
        return checkpoint.read_4bit(item.source)
    return checkpoint.read(item.source)


def _plain(item: shards.Item, content: Content, device: torch.device) -> Tensor:
    """The tensor of one item, on the CPU, in the layout's dtype."""
    if isinstance(content, Tensor):
        return content
    packed, state = content
    weight = dequantize_4bit(packed.to(device), state.to(device), item.parts[0].dtype)
    try:
        require_finite(weight, item.source)
    except NonFiniteError as error:
        found = str(error).partition(";")[0]
        raise NonFiniteError(f"{found} after dequantizing: its scales are not finite, or overflow the dtype") from None
    return weight.cpu()
