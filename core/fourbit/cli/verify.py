"""`fourbit verify`: whether a model folder is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from fourbit.cli import console, options


def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Model folder, or one .safetensors file.")],
    revision: options.Revision = None,
    as_json: options.AsJson = False,
) -> None:
    """Check a model folder against its manifest and its own metadata.

    Every byte is read and every hash compared; every 4-bit weight's state must fit its weight. A folder without a
    manifest, such as bitsandbytes' own, is checked for its own consistency. A file that the manifest does not know
    is a fault if a loader might read or run it, and a note if not, as with README.md. The exit status is 1 if
    anything is wrong, with a line for each fault; notes leave it 0.
    """
    from fourbit.checkpoint.verify import verify_checkpoint

    found = verify_checkpoint(options.source(path, revision))
    if as_json:
        console.print_json(found.to_dict())
    else:
        for fault in found.faults:
            console.out.print(Text("fault:", style="bold red"), fault, soft_wrap=True)
        for notice in found.notices:
            console.out.print(f"note: {notice}", soft_wrap=True)
        if found.ok:
            how = "every hash is right" if found.manifest else "consistent; it has no manifest, so no hash is compared"
            console.out.print(
                f"{found.path}: {found.tensors} tensors, {found.quantized} weights in 4 bits,"
                f" {found.nbytes:,} bytes: {how}",
                soft_wrap=True,
            )
    if not found.ok:
        raise typer.Exit(1)
