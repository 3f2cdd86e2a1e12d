"""`fourbit quantize`: a 4-bit copy of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourbit.cli import console, options

if TYPE_CHECKING:
    import torch

    from fourbit.checkpoint.quantize import QuantizeReport
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
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--overwrite",
            help="Continue an interrupted run where it was, or start afresh and replace DST if it is a model folder"
            " with nothing else in it.",
            show_default="neither: an error if DST or an interrupted run is there",
        ),
    ] = None,
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
    from fourbit.checkpoint.quantize import require_work

    overwrite = resume is False
    config = options.config(quant_type, blocksize, double_quant, compute_dtype, skip)
    where = options.device(device)
    src = options.source(src)
    if dry_run:
        plan, nbytes = check_and_plan(src, dst, config, where, overwrite, resume is True)
        if as_json:
            console.print_json({"dry_run": True, "bytes_written": nbytes, **plan.to_dict()})
        else:
            show_plan(plan, nbytes)
        require_work(plan)
    else:
        report = run(src, dst, config, where, overwrite, resume is True)
        plan = report.plan
        if as_json:
            console.print_json({"dry_run": False, **report.to_dict()})
        else:
            show_report(report)
    warn(plan)


def check_and_plan(
    src: Path, dst: Path, config: QuantConfig, device: torch.device, overwrite: bool, resume: bool
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
        others.require_free_names(checkpoint)
        destination.check(source, others.every_file(checkpoint), target, overwrite or resume)
        planned = plan(checkpoint, config, device=device)
        return planned, sum(item.nbytes for item in output_items(checkpoint, planned))


def run(
    src: Path, dst: Path, config: QuantConfig, device: torch.device, overwrite: bool, resume: bool = False
) -> QuantizeReport:
    """Quantize with a bar. `fourbit demo` goes through here too."""
    from fourbit.checkpoint.destination import unfinished_folder
    from fourbit.checkpoint.quantize import quantize_checkpoint

    with console.byte_progress() as bar:
        task = bar.add_task("quantizing", total=None)

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        try:
            return quantize_checkpoint(
                src, dst, config, device=device, overwrite=overwrite, resume=resume, progress=advance
            )
        except KeyboardInterrupt:
            if unfinished_folder(dst.expanduser().resolve()).is_dir():
                raise KeyboardInterrupt("interrupted; the same command with --resume continues") from None
            raise


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


def show_report(report: QuantizeReport) -> None:
    """What was done, in few lines."""
    console.out.print(
        f"{report.source} -> {report.destination}"
        f" in {report.seconds:.1f} s; {len(report.files)} weight file(s), {len(report.copied)} other file(s) copied",
        soft_wrap=True,
    )
    if report.resumed_bytes:
        done = f"{console.size(report.resumed_bytes)} of {console.size(report.bytes_before)}"
        console.note(f"resumed: an earlier run had done {done}")
    console.left_out(report.left_out, report.skipped)
    note_leftovers(report.leftovers)
    show_sizes(report.plan, report.bytes_after)


def note_leftovers(leftovers: tuple[Path, ...]) -> None:
    """A line for each folder that a run left beside the new one."""
    for path in leftovers:
        console.note(f"left over from this run or an earlier one; remove it if you do not need it: {path}")


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
