"""`fourbit quantize`: a 4-bit copy of a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourbit.cli import console, conversion, options

if TYPE_CHECKING:
    import torch

    from fourbit.config import QuantConfig
    from fourbit.plans import QuantPlan


def quantize(
    src: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="Model folder (safetensors, 16 or 32 bit), one .safetensors file, a Hub's name in the local cache, or"
            " a folder's URL that fsspec reads (s3://, gs://, hf:// …).",
        ),
    ],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="New folder for the 4-bit model.")],
    quant_type: options.QuantType = "nf4",
    blocksize: options.Blocksize = None,
    double_quant: options.DoubleQuant = False,
    compute_dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision of the forward pass: bfloat16, float16 or float32.",
            show_default="the weights' own",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Modules to leave as they are, such as 'model.layers.0.*' or 'v_proj'; may be repeated.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to quantize: cpu, cuda, cuda:1 …")] = "cpu",
    components: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Of a pipeline of diffusers, the components to quantize, such as transformer,text_encoder_2,vae.",
            show_default="denoisers and text encoders",
        ),
    ] = None,
    max_shard_size: conversion.MaxShardSize = None,
    revision: options.Revision = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and the sizes; write nothing.")] = False,
    resume: conversion.Resume = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a 4-bit copy of the model folder SRC to DST.

    The copy has the layout of bitsandbytes: fourbit reads it, and transformers with bitsandbytes, but for experts that
    transformers stacks. Embeddings, norms, output heads, routers and what the model keeps in float32 stay as they are;
    --dry-run says which, by what rule. Tensors are read and written one at a time, and DST appears only when all of
    it is there and was read back. Until then it is in .DST.unfinished beside it; if the run is interrupted, even by a
    power cut, the same command with --resume continues it.

    SRC may be a repository in the Hub's cache, or the Hub's name of a model that is in it; nothing is fetched. Of a
    pipeline of diffusers the denoisers and text encoders are quantized, of a model of sentence-transformers the
    transformer; the rest is carried over, all into one new folder. What others quantized, adapters, and models in
    which there is nothing to quantize are refused. Links out of SRC are not followed.
    """
    from fourbit.checkpoint.quantize import models, quantize_checkpoint, require_work

    with nullcontext() if dry_run else conversion.checking(dst):
        config = options.config(quant_type, blocksize, double_quant, compute_dtype, skip)
        where = options.device(device)
        size = conversion.check_size(max_shard_size)
        src = options.source(src, revision, urls=True)
    reports = conversion.reports()
    chosen = None if components is None else [name.strip() for name in components.split(",") if name.strip()]
    if dry_run:
        plans, plan, nbytes = check_and_plan(src, dst, config, where, resume is not None, chosen)
        if not reports:
            return
        if as_json:
            value = {"dry_run": True, "bytes_written": nbytes, "models": models(plans)}
            console.print_json({**value, **plan.to_dict()})
        else:
            show_plan(plan, nbytes)
            show_models(plans)
            console.out.print("dry run: nothing was written")
        require_work(plan)
    else:
        convert = partial(quantize_checkpoint, src, config=config, device=where, components=chosen, max_shard_size=size)
        report = conversion.run("quantizing", convert, dst, resume)
        plan = report.plan
        if not reports:
            return
        if as_json:
            console.print_json({"dry_run": False, **report.to_dict()})
        else:
            conversion.show(report)
            show_sizes(plan, report.bytes_after)
            show_models(report.plans)
    warn(plan)


def check_and_plan(
    src: Path,
    dst: Path,
    config: QuantConfig,
    device: torch.device,
    may_replace: bool,
    components: list[str] | None,
) -> tuple[dict[str, QuantPlan], QuantPlan, int]:
    """What would be done, for each model and in all, and the bytes of all tensors then.

    After the checks that do not need the weights.
    """
    from fourbit.checkpoint import destination, others, remote
    from fourbit.checkpoint.compound import Compound
    from fourbit.checkpoint.plan import combined
    from fourbit.checkpoint.quantize import checked_plans, output_items
    from fourbit.checkpoint.source import resolved
    from fourbit.checkpoint.urls import refuse_destination

    refuse_destination(dst)
    with remote.opened(src) as (path, there), Compound(resolved(path), there) as source:
        plans = checked_plans(source, config, device, components)
        beside = others.find(source)
        others.require_free_names(source, beside)
        target = dst.expanduser().resolve()
        destination.check(source.path, others.every_file(source, beside), target, may_replace)
        planned = combined(source, plans)
        return plans, planned, sum(item.nbytes for item in output_items(source, planned))


def show_models(plans: Mapping[str, QuantPlan]) -> None:
    """Where there are several models, a line for what becomes of each."""
    if len(plans) < 2:
        return
    for folder, plan in plans.items():
        what = f"{len(plan.quantized)} of {len(plan.tensors)} tensors quantized"
        if not plan.quantized:
            rules = {t.rule for t in plan.tensors}
            what = "as it is" + (f" ({rules.pop()})" if len(rules) == 1 else "")
        sizes = f"{plan.bytes_before:,} -> {plan.bytes_after:,} bytes"
        console.out.print(f"{folder or '.'}: {what}, {sizes}", soft_wrap=True, highlight=False)


def show_plan(plan: QuantPlan, nbytes: int) -> None:
    """Every tensor and what would become of it, then the totals."""
    table = console.table(None, "tensor", "action", "rule", "shape", "before", "after", left=3)
    for t in plan.tensors:
        style = "bold yellow" if t.large_left else "" if t.action == "quantize" else "dim"
        cells = (t.name, t.action, t.rule, console.shape(t.shape))
        table.add_row(*cells, f"{t.bytes_before:,}", f"{t.bytes_after:,}", style=style)
    console.out.print(table)
    show_sizes(plan, nbytes)


def show_sizes(plan: QuantPlan, total_after: int) -> None:
    """The table of bytes before and after."""
    double = ", double-quantized" if plan.config.double_quant else ""
    kind = f"{plan.config.quant_type}, blocksize {plan.blocksize}{double}"
    table = console.table(kind, "", "tensors", "parameters", "bytes before", "bytes after", "bits per parameter")
    groups = (("quantized to 4 bits", plan.quantized), ("left as they are", plan.skipped))
    for label, tensors in groups:
        count = sum(t.parameters for t in tensors)
        after = sum(t.bytes_after for t in tensors)
        before = sum(t.bytes_before for t in tensors)
        bits = f"{8 * after / count:.6f}" if count else "-"
        table.add_row(label, f"{len(tensors)}", f"{count:,}", f"{before:,}", f"{after:,}", bits)
    if total_after != plan.bytes_after:
        table.add_row("code tables, metadata", "", "", "", f"{total_after - plan.bytes_after:,}", "")
    bits = f"{8 * total_after / plan.parameters:.6f}" if plan.parameters else "-"
    cells = (f"{len(plan.tensors)}", f"{plan.parameters:,}", f"{plan.bytes_before:,}", f"{total_after:,}", bits)
    table.add_section()
    table.add_row("whole model", *cells, style="bold")
    console.out.print(table)
    console.out.print(f"layers as described by {plan.described_by}", soft_wrap=True)
    for rule, names in _large_by_choice(plan).items():
        console.out.print(f"left as they are by rule ({rule}): {', '.join(names)}")


def _large_by_choice(plan: QuantPlan) -> dict[str, list[str]]:
    from fourbit.plans import LARGE

    found: dict[str, list[str]] = {}
    for t in plan.skipped:
        if t.parameters >= LARGE and not t.large_left:
            found.setdefault(t.rule, []).append(f"{t.name} {console.shape(t.shape)} ({console.size(t.bytes_after)})")
    return found


def warn(plan: QuantPlan) -> None:
    """A line that cannot be missed for each large tensor that stays in 16 bit though nobody chose so."""
    for t in plan.large_left:
        console.warning(
            f"{t.name} {console.shape(t.shape)} STAYS IN {8 * t.dtype.itemsize} BIT: {t.bytes_after:,} bytes; {t.rule}"
        )
