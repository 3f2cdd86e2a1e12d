"""`fourbit compare`: how far the weights of two checkpoints are apart."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourbit.cli import console, options

if TYPE_CHECKING:
    from fourbit.checkpoint.compare import Comparison, TensorDifference


def compare(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="The original: a folder of safetensors, or one .safetensors file.")
    ],
    b: Annotated[Path, typer.Argument(metavar="B", help="What is measured against it, such as its 4-bit copy.")],
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write the table to FILE as CSV too.")
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE.png", help="Draw each tensor's SQNR to FILE; needs matplotlib, the extra 'plot'."
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Branch, tag or commit of A, where it is a Hub's model, in the local Hub cache."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure every tensor of B against the one of the same name in A, and list the worst first.

    Both may be 4-bit folders or plain ones. SQNR is the power of A's weights over that of the difference, in
    decibels: higher is better, and NF4 has about 20. The exit status is 1 if a tensor could not be compared,
    such as one with another shape; a name that only one side has is listed, and no error.
    """
    from fourbit.checkpoint.compare import compare_checkpoints

    if plot_file is not None:
        from fourbit.cli import compare_plot

        compare_plot.require_matplotlib()  # before the work, not after
    a, b = options.source(a, revision), options.source(b)
    with console.bar("comparing") as advance:
        found = compare_checkpoints(a, b, progress=lambda _, done, total: advance(done, total))
    if csv_file is not None:
        write_csv(found, csv_file)
    if plot_file is not None:
        compare_plot.draw(found, plot_file)
    if as_json:
        console.print_json(found.to_dict())
    else:
        show(found)
    if found.errors:
        for t in found.errors:
            console.error(f"{t.name}: {t.error}")
        raise typer.Exit(1)


def write_csv(found: Comparison, path: Path) -> None:
    """One row a tensor, the worst first; empty cells where there is no figure."""
    rows = [t.to_dict() for t in found.tensors]
    with open(path, "w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows({**row, "shape": "x".join(map(str, row["shape"]))} for row in rows)


def show(found: Comparison) -> None:
    """The table of what differs, then what does not and what only one side has."""
    columns = ("tensor", "A", "B", "shape", "RMSE", "relative RMSE", "SQNR dB", "max error")
    title = console.lines(f"A: {found.a}", f"B: {found.b}", style="table.title")
    table = console.table(title, *columns, left=3, wrap=1)
    for t in found.tensors:
        if t.identical:
            continue
        name = t.name if t.name == t.name_in_b else f"{t.name} ({t.name_in_b} in B)"
        style = "" if t.error is None else "bold red"
        table.add_row(name, t.type_a, t.type_b, console.shape(t.shape), *_figures(t), style=style)
    if found.total is not None:
        table.add_section()
        count = f"{found.total.parameters:,}"
        table.add_row("all of these", "", "", count, *_figures(found.total), style="bold")
    if table.row_count:
        console.out.print(table)
    identical = sum(t.identical for t in found.tensors)
    console.out.print(f"{len(found.tensors)} tensors compared, {identical} of them identical")
    for side, names in (("A", found.only_in_a), ("B", found.only_in_b)):
        if names:
            console.out.print(f"only in {side}: {', '.join(names)}", soft_wrap=True)


def _figures(t: TensorDifference) -> tuple[str, str, str, str]:
    if t.error is not None:
        return ("-", "-", "-", "-")
    relative = "-" if t.relative_rmse is None else f"{100 * t.relative_rmse:.3f} %"
    ratio = "-" if t.sqnr_db is None else f"{t.sqnr_db:.2f}"
    return (f"{t.rmse:.3e}", relative, ratio, f"{t.max_abs_error:.3e}")
