"""Output of the commands: results on stdout, progress and errors on stderr, bars only on a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

PIPED_WIDTH = 160
"""Columns where stdout is no terminal and COLUMNS is not set: rows stay in one line."""


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return Console(stderr=stderr, width=width, highlight=False)


out = _console(stderr=False)
err = _console(stderr=True)


JSON_SCHEMA = 1
"""Version of every command's --json. A key that goes or changes its meaning raises it; a new one does not."""


def print_json(value: Mapping[str, Any]) -> None:
    """Only this goes to stdout under --json: an object that begins with the version of its schema."""
    print(json.dumps({"schema": JSON_SCHEMA, **value}, indent=2, allow_nan=False))


def error(message: str) -> None:
    """One line on stderr, however long."""
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


def warning(message: str) -> None:
    """One line on stderr that stands out."""
    err.print(f"[bold black on yellow] WARNING [/] [bold yellow]{escape(message)}[/]", soft_wrap=True)


def note(message: str) -> None:
    """One line on stderr."""
    err.print(f"[dim]{escape(message)}[/]", soft_wrap=True)


def escape(text: str) -> str:
    """Text without markup, and without control characters: names in files are a stranger's."""
    from rich.markup import escape as markup

    return markup("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def table(
    title: str | None, *columns: str, left: int = 1, wrap: int | None = None, caption: str | None = None
) -> Table:
    """A table whose first `left` columns are text and the others numbers; the first `wrap` (`left`) may wrap."""
    made = Table(title=title, caption=caption, title_justify="left", caption_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        keep = i >= (left if wrap is None else wrap)
        # a long name goes on in the next line rather than be cut
        made.add_column(column, justify="left" if i < left else "right", overflow="fold", no_wrap=keep)
    return made


def byte_progress() -> Progress:
    """A bar in bytes, with rate and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
        transient=True,
    )


def step_progress() -> Progress:
    """A bar in steps."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=err,
        disable=not err.is_terminal,
        transient=True,
    )


def size(nbytes: float) -> str:
    """Bytes for people: "269.1 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.1f} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def shape(sizes: tuple[int, ...]) -> str:
    """A shape for people: "576×1536"."""
    return "×".join(map(str, sizes)) or "scalar"
