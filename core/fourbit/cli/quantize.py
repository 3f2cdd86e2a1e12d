"""`fourbit quantize`: a 4-bit copy of a model folder."""

from __future__ import annotations

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
        Path, typer.Argument(metavar="SRC", help="Model folder (safetensors, 16 or 32 bit), or one .safetensors file.")
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

    SRC may be a repository in the Hub's cache, or the Hub's name of a model that is in it; nothing is fetched. What
    others quantized, adapters, and models in which there is nothing to quantize are refused. Links out of SRC are
    not followed.
    """
    from fourbit.checkpoint.quantize import quantize_checkpoint, require_work

    config = options.config(quant_type, blocksize, double_quant, compute_dtype, skip)
    where = options.device(device)
    src = options.source(src)
    if dry_run:
        plan, nbytes = check_and_plan(src, dst, config, where, resume is not None)
        if as_json:
            console.print_json({"dry_run": True, "bytes_written": nbytes, **plan.to_dict()})
        else:
            show_plan(plan, nbytes)
        require_work(plan)
    else:
        convert = partial(quantize_checkpoint, src, config=config, device=where)
        report = conversion.run("quantizing", convert, dst, resume)
        plan = report.plan
        if as_json:
            console.print_json({"dry_run": False, **report.to_dict()})
        else:
            conversion.show(report)
            show_sizes(plan, report.bytes_after)
    warn(plan)


def check_and_plan(
    src: Path, dst: Path, config: QuantConfig, device: torch.device, may_replace: bool
) -> tuple[QuantPlan, int]:
    """What would be done, and the bytes of all tensors then, after the checks that do not need the weights."""
    from fourbit.checkpoint import destination, others
    from fourbit.checkpoint.foreign import require_unquantized
    from fourbit.checkpoint.plan import plan
    from fourbit.checkpoint.quantize import output_items
    from fourbit.checkpoint.reader import Checkpoint
    from fourbit.checkpoint.source import resolved

    source = resolved(src)
    with Checkpoint(source) as checkpoint:
        require_unquantized(checkpoint)
        target = dst.expanduser().resolve()
        beside = others.find(checkpoint)
        others.require_free_names(checkpoint, beside)
        destination.check(source, others.every_file(checkpoint, beside), target, may_replace)
        planned = plan(checkpoint, config, device=device)
        return planned, sum(item.nbytes for item in output_items(checkpoint, planned))


def show_plan(plan: QuantPlan, nbytes: int) -> None:
    """Every tensor and what would become of it, then the totals."""
    table = console.table(None, "tensor", "action", "rule", "shape", "before", "after", left=3)
    for t in plan.tensors:
        style = "bold yellow" if t.large_left else "" if t.action == "quantize" else "dim"
        cells = (t.name, t.action, t.rule, console.shape(t.shape))
        table.add_row(*cells, f"{t.bytes_before:,}", f"{t.bytes_after:,}", style=style)
    console.out.print(table)
    show_sizes(plan, nbytes)
    console.out.print("dry run: nothing was written")


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
