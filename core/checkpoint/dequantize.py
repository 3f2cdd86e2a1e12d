"""Dequantizing a 4-bit model folder tensor by tensor: `quantize` backwards, with the same guarantees."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourbit.checkpoint import layout, shards, staging, writer
from fourbit.checkpoint.build import Progress
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.reader import Checkpoint
from fourbit.functional import NonFiniteError, dequantize_4bit, require_finite


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
        copied: other files carried over; left_out: files with weights in other forms, which were not.
        seconds: that it took.
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
    seconds: float

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
            "seconds": self.seconds,
        }


def dequantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
    max_shard_bytes: int = shards.MAX_SHARD_BYTES,
) -> DequantizeReport:
    """Write a copy of the 4-bit model folder `src` to `dst` whose weights are plain 16- or 32-bit tensors.

    `quantization_config` leaves config.json; other files are carried over. In memory are one weight in 4 bits
    and the same weight dequantized.

    Args:
        src: a folder that fourbit or bitsandbytes wrote, or one .safetensors file.
        dst: the new folder. It is there only once it is complete.
        dtype: float32, bfloat16 or float16 for the 4-bit weights; None: for each the one that was quantized.
            Other tensors keep theirs.
        device: where to dequantize.
        overwrite: replace `dst` if it is a model folder already; until the new one is complete it stays.
        progress: called after each tensor.
        max_shard_bytes: size at which the next weight file is begun.

    Raises:
        CheckpointError: the source is malformed or has no 4-bit weight, or the destination cannot be written.
        NonFiniteError: a weight dequantizes to NaN or Inf, or overflows `dtype`; nothing is left behind.
    """
    begin = time.perf_counter()
    source, target = Path(src).expanduser().resolve(), Path(dst).expanduser().resolve()
    with Checkpoint(source) as checkpoint:
        require_quantized(checkpoint)
        staging.check_destination(source, target, overwrite)
        config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        items = output_items(checkpoint, dtype)
        layouts = shards.arrange(items, {**checkpoint.metadata, "format": "pt"}, max_shard_bytes)
        staging.check_space(target.parent, sum(len(s.header) + item.nbytes for s in layouts for item in s.items))
        with staging.staged_folder(target, overwrite) as folder:
            _write_weights(checkpoint, folder, layouts, torch.device(device), progress)
            copied: list[str] = []
            left_out: list[str] = []
            if source.is_dir():
                copied, left_out = writer.copy_other_files(source, folder)
                used = {file.name for file in checkpoint.files} | {layout.INDEX_FILE}
                left_out = [name for name in left_out if name not in used]
            if config:
                writer.write_json(folder / layout.CONFIG_FILE, config)
            check_written(folder, items)
        quantized = checkpoint.quantized()
        names = [item.source for item in items]
        return DequantizeReport(
            *(source, target, tuple(n for n in names if n in quantized), tuple(n for n in names if n not in quantized)),
            *(tuple(s.file for s in layouts), checkpoint.nbytes, sum(item.nbytes for item in items)),
            *(tuple(copied), tuple(left_out), time.perf_counter() - begin),
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


def _write_weights(
    checkpoint: Checkpoint,
    folder: Path,
    layouts: list[shards.Shard],
    device: torch.device,
    progress: Progress | None,
) -> None:
    done, total = 0, sum(item.nbytes for shard in layouts for item in shard.items)
    for shard in layouts:
        with writer.atomic_file(folder / shard.file) as stream:
            shard_writer = writer.ShardWriter(stream, shard)
            for item in shard.items:
                shard_writer.write(item, {item.source: _plain(checkpoint, item, device)})
                done += item.nbytes
                if progress is not None:
                    progress(item.source, done, total)
    if len(layouts) > 1:
        writer.write_json(folder / layout.INDEX_FILE, shards.index(layouts))


def _plain(checkpoint: Checkpoint, item: shards.Item, device: torch.device) -> Tensor:
    """The tensor of one item, on the CPU, in the layout's dtype."""
    if item.source not in checkpoint.quantized():
        return checkpoint.read(item.source)
    packed, state = checkpoint.read_4bit(item.source)
    weight = dequantize_4bit(packed.to(device), state.to(device), item.parts[0].dtype)
    try:
        require_finite(weight, item.source)
    except NonFiniteError as error:
        found = str(error).partition(";")[0]
        raise NonFiniteError(f"{found} after dequantizing: its scales are not finite, or overflow the dtype") from None
    return weight.cpu()


def check_written(folder: Path, items: list[shards.Item]) -> None:
    """Open the result as a stranger would, and compare names, dtypes and shapes with the layout."""
    with Checkpoint(folder) as written:
        want = {part.name: (part.dtype, part.shape) for item in items for part in item.parts}
        have = {name: (info.dtype, info.shape) for name, info in written.entries.items()}
        if want != have:
            wrong = min(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))
            raise CheckpointError(f"{folder}: reading back what was written failed at {wrong!r}")
