"""`fourbit inspect`: what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fourbit.cli import console, options


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Folder of safetensors, or one .safetensors or index file.")
    ],
    revision: options.Revision = None,
    as_json: options.AsJson = False,
) -> None:
    """List the tensors of a model folder or file: shape, type, blocksize, bits, bytes, and the totals.

    It reads 4-bit folders of fourbit and bitsandbytes, and plain safetensors; of a pipeline of diffusers, or a model
    of sentence-transformers, all models that are in it.
    """
    from fourbit.checkpoint.inspect import inspect_checkpoint

    found = inspect_checkpoint(options.source(path, revision))
    if as_json:
        console.print_json(found.to_dict())
        return
    columns = ("tensor", "type", "shape", "blocksize", "bits/param", "bytes")
    double = any(t.double_quant for t in found.tensors)
    caption = "dq: double-quantized, the scales are in 8 bits too" if double else None
    title = f"{found.path}: {found.kind}"
    table = console.table(title, *columns, left=2, wrap=1, caption=caption)
    for t in found.tensors:
        kind = f"{t.type} dq" if t.double_quant else t.type
        cells = (t.name, kind, console.shape(t.shape))
        table.add_row(*cells, str(t.blocksize or ""), f"{t.bits_per_parameter:.4f}", f"{t.nbytes:,}")
    console.out.print(table)
    totals = console.table(None, "", "tensors", "parameters", "bytes", "bits per parameter")
    four = [t for t in found.tensors if t.is_4bit]
    rest = [t for t in found.tensors if not t.is_4bit]
    for label, group in (("4-bit", four), ("other", rest)):
        count, nbytes = sum(t.parameters for t in group), sum(t.nbytes for t in group)
        bits = f"{8 * nbytes / count:.6f}" if count else "-"
        totals.add_row(label, f"{len(group)}", f"{count:,}", f"{nbytes:,}", bits)
    if four:
        totals.add_row("code tables, metadata", "", "", f"{sum(t.table_bytes for t in four):,}", "")
    totals.add_section()
    whole = (f"{len(found.tensors)}", f"{found.parameters:,}", f"{found.nbytes:,}", f"{found.bits_per_parameter:.6f}")
    totals.add_row("whole", *whole, style="bold")
    console.out.print(totals)
