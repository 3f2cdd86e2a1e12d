"""`fourbit backends`: which backends there are, and why the others are not."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from fourbit.cli import console, options

_STYLES = {"ready": "green", "unavailable": "dim", "disabled": "dim"}


def backends(
    as_json: options.AsJson = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show tracebacks of those that failed.")] = False,
) -> None:
    """List every backend in the order in which they are asked, with its state and the reason."""
    import warnings

    from fourbit.plugins import backends as find
    from fourbit.registry import BackendWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BackendWarning)  # the table says the same, and more
        found = find()
    if as_json:
        console.print_json({"backends": [asdict(info) for info in found]})
        return
    table = console.table(None, "backend", "state", "devices", "blocksize", "reason", "source", left=6)
    for info in found:
        devices = ", ".join(info.device_types).replace("*", "any")
        cells = (info.name, info.state, devices, str(info.default_blocksize or ""))
        style = _STYLES.get(info.state, "bold red")
        table.add_row(*cells, info.reason, info.source, style=style)
    console.out.print(table)
    for info in found:
        if verbose and info.traceback:
            console.out.print()
            console.out.print(info.name, style="bold")
            console.out.print(console.lines(*info.traceback.splitlines()), soft_wrap=True)
        elif info.traceback:
            console.note(f"{info.name} failed; -v shows its traceback")
