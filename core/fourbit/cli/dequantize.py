"""`fourbit dequantize`: a 4-bit model folder back in 16 or 32 bit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourbit.cli import console, options
from fourbit.cli.quantize import note_leftovers

if TYPE_CHECKING:
    from fourbit.checkpoint.dequantize import DequantizeReport


def dequantize(
    src: Annotated[
        Path, typer.Argument(metavar="SRC", help="4-bit folder of fourbit or bitsandbytes, or one .safetensors file.")
    ],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="New folder for the 16- or 32-bit model.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the dequantized weights: bfloat16, float16 or float32.",
            show_default="of each weight before it was quantized",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to dequantize: cpu, cuda, cuda:1 …")] = "cpu",
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
    """Write a copy of the 4-bit model folder SRC to DST with plain 16- or 32-bit weights.

    The copy loads wherever a model that was never quantized does; the precision that quantizing took away does
    not come back. Tensors that were not in 4 bits are carried over byte for byte. DST appears only when all of
    it is there and was read back; an interrupted run can be continued with --resume.
    """
    from fourbit.checkpoint.dequantize import dequantize_checkpoint
    from fourbit.checkpoint.destination import unfinished_folder
    from fourbit.config import as_compute_dtype

    try:
        kind = as_compute_dtype(dtype)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error).replace("compute_dtype", "--dtype")) from None
    where = options.device(device)
    src = options.source(src)
    choice = {"overwrite": resume is False, "resume": resume is True}
    with console.byte_progress() as bar:
        task = bar.add_task("dequantizing", total=None)

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        try:
            report = dequantize_checkpoint(src, dst, dtype=kind, device=where, progress=advance, **choice)
        except KeyboardInterrupt:
            if unfinished_folder(dst.expanduser().resolve()).is_dir():
                raise KeyboardInterrupt("interrupted; the same command with --resume continues") from None
            raise
    if as_json:
        console.print_json(report.to_dict())
    else:
        show(report)


def show(report: DequantizeReport) -> None:
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
    console.out.print(
        f"{len(report.dequantized)} weights dequantized, {len(report.carried)} other tensors carried over;"
        f" {report.bytes_before:,} -> {report.bytes_after:,} bytes",
        soft_wrap=True,
    )
