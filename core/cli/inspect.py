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
    as_json: options.AsJson = False,
) -> None:
    """List the tensors of a model folder or file: shape, type, blocksize, bits, bytes, and the totals.

    It reads 4-bit folders of fourbit and bitsandbytes, and plain safetensors.
    """
    from fourbit.checkpoint.inspect import inspect_checkpoint

    found = inspect_checkpoint(path)
    if as_json:
        console.print_json(found.to_dict())
        return
    columns = ("tensor", "type", "from", "shape", "blocksize", "bits/param", "bytes")
    table = console.table(f"{console.escape(str(found.path))}: {found.kind}", *columns, left=3)
    for t in found.tensors:
        kind = t.type + (" + 8-bit scales" if t.double_quant else "")
        cells = (console.escape(t.name), kind, t.dtype if t.is_4bit else "", console.shape(t.shape))
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
    cells = (f"{len(found.tensors)}", f"{found.parameters:,}", f"{found.nbytes:,}", f"{found.bits_per_parameter:.6f}")
    totals.add_row("whole", *cells, style="bold")
    console.out.print(totals)
