"""Dequantizing a 4-bit model folder tensor by tensor: `quantize` backwards, with the same guarantees."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourbit.checkpoint import early, remote
from fourbit.checkpoint.build import build
from fourbit.checkpoint.compound import Compound
from fourbit.checkpoint.conversion import Job, Progress, Report, Request
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.file_layout import Item, Part, plain_item
from fourbit.checkpoint.plan import transposed
from fourbit.checkpoint.processes import Processes
from fourbit.checkpoint.source import resolved
from fourbit.checkpoint.tensors import Tensors
from fourbit.functional import NonFiniteError, dequantize_4bit, require_finite
from fourbit.state import QuantState, dtype_name


@dataclass(frozen=True)
class DequantizeReport(Report):
    """What `dequantize_checkpoint` did: all that a `Report` has, and

    Attributes:
        dequantized: names of the weights that were in 4 bits.
        carried: names of the other tensors, which are the same bytes as before.
    """

    dequantized: tuple[str, ...]
    carried: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return self._as_json(dequantized=list(self.dequantized), carried=list(self.carried))


def dequantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    max_shard_size: int | str | None = None,
    processes: Processes | None = None,
) -> DequantizeReport:
    """Write a copy of the 4-bit model folder `src` to `dst` whose weights are plain 16- or 32-bit tensors.

    `quantization_config` leaves config.json, that of each model in 4 bits where there are several; other files are
    carried over. Weights of transformers' Conv1D are [in, out] again (see `plan.transposed`). Reading, dequantizing and
    writing overlap; in memory are a few weights at a time.

    Args:
        src: a folder that fourbit or bitsandbytes wrote, or one .safetensors file, or the URL of a folder.
        dst: the new folder. It is there only once it is complete.
        dtype: float32, bfloat16 or float16 for the 4-bit weights; None: for each the one that was quantized.
            Other tensors keep theirs.
        device: where to dequantize.
        overwrite, resume, progress, max_shard_size, processes: as in `quantize_checkpoint`.

    Raises:
        CheckpointError: the source is malformed or has no 4-bit weight, the destination exists or cannot
            be written, or there is an unfinished folder and neither `resume` nor `overwrite`.
        NonFiniteError: a weight dequantizes to NaN or Inf, or overflows `dtype`; nothing is left behind.
        ValueError: both `overwrite` and `resume`, or a `max_shard_size` that is none.
    """
    request = Request("dequantize_checkpoint", dst, overwrite, resume, progress, max_shard_size, processes)
    with early.told(request), remote.opened(src) as (path, there), Compound(resolved(path), there) as source:
        require_quantized(source)
        where = torch.device(device)
        turned = transposed(source) & source.quantized().keys()
        settings: dict[str, Any] = {"dequantize": "the stored types" if dtype is None else dtype_name(dtype)}
        job = Job(
            request,
            source,
            items=output_items(source, dtype, turned),
            settings={**settings, "transposed": sorted(turned)} if turned else settings,
            configs=_configs(source),
            read=lambda item: _read(source, item),
            convert=lambda item, content: {item.source: _plain(item, content, item.source in turned, where)},
        )
        report, quantized, names = build(job), source.quantized(), [item.source for item in job.items]
    return DequantizeReport(
        **vars(report),
        dequantized=tuple(name for name in names if name in quantized),
        carried=tuple(name for name in names if name not in quantized),
    )


def require_quantized(source: Compound) -> None:
    """Raise CheckpointError if the source has no 4-bit weight in a layout that is read here."""
    if source.quantized():
        return
    methods = (m.checkpoint.quantization_config().get("quant_method") for m in source.members.values())
    method = next(filter(None, methods), None)
    said = f"; its config.json says {method}" if method else ""
    raise CheckpointError(f"{source.path} has no 4-bit weight in the bitsandbytes layout{said}")


def _configs(source: Compound) -> dict[str, dict[str, Any] | None]:
    """The config.json of each model in 4 bits, without what says so; None where it says nothing else."""
    found = {}
    for folder, member in source.members.items():
        if member.checkpoint.quantized():
            config = member.checkpoint.config.items()
            found[folder] = {key: value for key, value in config if key != "quantization_config"} or None
    return found


def output_items(source: Tensors, dtype: torch.dtype | None = None, turned: Collection[str] = ()) -> list[Item]:
    """What each weight of the source becomes, in the source's order; only headers and states are read.

    `turned` are the names of 4-bit weights whose layers hold the transposed one.
    """
    companions = source.companions()
    items = []
    for name, info in source.entries.items():
        if name in companions:
            continue
        if name not in source.quantized():
            items.append(plain_item(info))
            continue
        state = source.state(name)
        kind = dtype or state.dtype
        shape = tuple(state.shape)
        part = Part(name, kind, shape[::-1] if name in turned else shape, state.numel * kind.itemsize)
        items.append(Item(name, False, (part,)))
    return items


Content = Tensor | tuple[Tensor, QuantState]


def _read(source: Tensors, item: Item) -> Content:
    if item.source in source.quantized():
        return source.read_4bit(item.source)
    return source.read(item.source)


def _plain(item: Item, content: Content, turned: bool, device: torch.device) -> Tensor:
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
    return (weight.T.contiguous() if turned else weight).cpu()
