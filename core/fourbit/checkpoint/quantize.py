"""Quantizing a model folder tensor by tensor, so that the model never has to fit in memory.

The plan decides and `file_layout` lays the files out; `build` writes them, so that it can be interrupted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourbit import codebooks
from fourbit.checkpoint import early, remote
from fourbit.checkpoint.build import build
from fourbit.checkpoint.compound import Compound
from fourbit.checkpoint.conversion import Job, Progress, Report, Request
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.file_layout import Item, packed_item, plain_item, quantized_item
from fourbit.checkpoint.foreign import require_unquantized
from fourbit.checkpoint.plan import combined, plan_members
from fourbit.checkpoint.processes import Processes
from fourbit.checkpoint.source import resolved
from fourbit.checkpoint.tensors import Tensors
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
        plans: the same of each model of the source, by its folder; {"": plan} of one model alone.
    """

    plan: QuantPlan
    plans: dict[str, QuantPlan]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**self._as_json(), "models": models(self.plans), "plan": self.plan.to_dict()}


def models(plans: Mapping[str, QuantPlan]) -> list[dict[str, Any]]:
    """As JSON values, what becomes of each model of a source."""
    return [
        {
            "folder": folder,
            "quantized": len(plan.quantized),
            "tensors": len(plan.tensors),
            "bytes_before": plan.bytes_before,
            "bytes_after": plan.bytes_after,
        }
        for folder, plan in plans.items()
    ]


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    config: QuantConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    max_shard_size: int | str | None = None,
    components: Sequence[str] | None = None,
    processes: Processes | None = None,
) -> QuantizeReport:
    """Write a 4-bit copy of the model folder `src` to `dst`, in the layout that bitsandbytes reads.

    Args:
        src: a folder of safetensors, or one .safetensors file; 16- or 32-bit. Also a repository in the Hub's cache,
            or the Hub's name of a model that is in it; nothing is fetched. Also a pipeline of diffusers, or a model of
            sentence-transformers: the copy has all of their models then. Also the URL of any such folder that fsspec
            reads, such as "s3://bucket/model": each tensor is fetched when it is its turn.
        dst: the new folder. It is there only once it is complete.
        config: how to quantize; default QuantConfig().
        device: where to quantize.
        overwrite: replace `dst` if it is a model folder already, with nothing else in it; until the new one is
            complete it stays, and if it has changed by then it stays, too. Begin afresh if there is an unfinished
            folder.
        resume: continue an unfinished folder if there is one; the bytes are those of an uninterrupted run. A
            `dst` that such a run has finished is left as it is, if every hash is still right.
        progress: called after each tensor.
        max_shard_size: of weight files, such as "5GB", "500MB" or "2GiB", or in bytes; a file has more only where one
            weight, with its scales, has. None: 5 GB.
        components: of a pipeline, those to quantize; None: the denoisers and text encoders.
        processes: where several processes do it together, which one this is; all are called with the same arguments
            otherwise, and see `src` and `dst` under the same names. Each writes a part of the weights, by bytes; the
            result is that of one process. If one fails or is killed the others stop, with an error that says why,
            within a few minutes; any number of processes, also one, can resume.

    Raises:
        CheckpointError: the source is malformed, an adapter, quantized already, or has nothing to quantize, or it
            changes meanwhile; the destination exists or cannot be written, or there is an unfinished folder and
            neither `resume` nor `overwrite`.
        NonFiniteError: a weight has NaN or Inf; its name and index are given, and nothing is left behind.
        ValueError: both `overwrite` and `resume`, or a `max_shard_size` that is none.
    """
    request = Request("quantize_checkpoint", dst, overwrite, resume, progress, max_shard_size, processes)
    config = config or QuantConfig()
    with early.told(request), remote.opened(src) as (path, there), Compound(resolved(path), there) as source:
        plans = checked_plans(source, config, device, components)
        planned = combined(source, plans)
        require_work(planned)
        where = torch.device(device)
        transposed = _transposed(planned)
        job = Job(
            request,
            source,
            items=output_items(source, planned),
            settings=_settings(planned, plans),
            configs=_configs(source, plans),
            read=lambda item: {part: source.read(part) for part in (item.source, *source.parts_of(item.source))},
            convert=lambda item, tensors: _converted(tensors, item, item.source in transposed, planned, where),
        )
        return QuantizeReport(**vars(build(job)), plan=planned, plans=plans)


def checked_plans(
    source: Compound, config: QuantConfig, device: torch.device | str, components: Sequence[str] | None = None
) -> dict[str, QuantPlan]:
    """A plan for each model of a source, by its folder.

    Raises CheckpointError for one that is quantized already, an adapter, chosen by the user with nothing to quantize
    in it, or has a broken config.json: before any work.
    """
    left = source.chosen(components)
    for folder, member in source.members.items():
        if folder not in left:
            require_unquantized(member.checkpoint)
    plans = plan_members(source, config, device, components)
    for folder in components or ():
        require_work(plans[folder])
    return plans


def _configs(source: Compound, plans: Mapping[str, QuantPlan]) -> dict[str, dict[str, Any] | None]:
    """The config.json of each model that is quantized."""
    return {
        folder: {**source.members[folder].checkpoint.config, "quantization_config": quantization_config(planned)}
        for folder, planned in plans.items()
        if planned.quantized
    }


def _settings(planned: QuantPlan, plans: Mapping[str, QuantPlan]) -> dict[str, Any]:
    """All that determines the output beside the source, as JSON values."""
    config = planned.config
    code = codebooks.get(config.quant_type)
    settings = {
        "quant_type": code.name,
        "codebook": list(code.values),
        "blocksize": planned.blocksize,
        "double_quant": config.double_quant,
        "quantization_config": {folder: quantization_config(each) for folder, each in plans.items() if each.quantized},
    }
    transposed = sorted(_transposed(planned))
    return {**settings, "transposed": transposed} if transposed else settings


def _transposed(planned: QuantPlan) -> frozenset[str]:
    return frozenset(t.name for t in planned.quantized if t.transposed)


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


def output_items(source: Tensors, planned: QuantPlan) -> list[Item]:
    """What each tensor of the source becomes, in the source's order; sizes are exact before anything is read."""
    kind, double = planned.config.quant_type, planned.config.double_quant
    companions = source.companions()
    items = []
    for t in planned.tensors:
        if t.action == "quantize":
            items.append(quantized_item(t.name, t.shape_in_4bit, t.dtype, kind, planned.blocksize, double))
        elif t.name in source.quantized():  # in a model that stays as it is
            source.state(t.name)  # fits the weight, or is an error
            items.append(packed_item(source.info(t.name), map(source.info, source.parts_of(t.name))))
        elif t.name not in companions:
            items.append(plain_item(source.info(t.name)))
    names: set[str] = set()
    for part in (part for item in items for part in item.parts):
        if part.name in names:
            raise CheckpointError(f"{source.path}: the name {part.name!r} is needed for a 4-bit weight's state")
        names.add(part.name)
    return items


def _converted(
    tensors: Mapping[str, Tensor], item: Item, transposed: bool, planned: QuantPlan, device: torch.device
) -> Mapping[str, Tensor]:
    """The tensors of one item, by name, on the CPU."""
    if not item.quantize:
        return tensors
    weight = tensors[item.source].to(device)
    require_finite(weight, item.source)
    config = planned.config
    packed, state = quantize_4bit(
        weight.T.contiguous() if transposed else weight,
        quant_type=config.quant_type,
        blocksize=planned.blocksize,
        double_quant=config.double_quant,
    )
    parts = {item.source: packed, **state.to_state_dict(item.source + ".")}
    return {name: part.cpu() for name, part in parts.items()}


def quantization_config(planned: QuantPlan) -> dict[str, Any]:
    """The entry of config.json that makes transformers, peft and vLLM read the folder."""
    dtype = planned.config.compute_dtype or next((t.dtype for t in planned.quantized), torch.bfloat16)
    return as_bitsandbytes(planned.config, dtype, planned.left_modules)
