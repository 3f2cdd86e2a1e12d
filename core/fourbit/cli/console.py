"""Output of the commands: results on stdout, progress and errors on stderr, bars only on a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from fourbit.literal import literal

PIPED_WIDTH = 160
"""Columns where stdout is no terminal and COLUMNS is not set: rows stay in one line."""


class LiteralConsole(Console):
    """A console on which every string is shown literally, since names and values in files are a stranger's.

    It is the one place where strings become what is shown: neither markup such as [red] nor :bomb: means anything,
    and no control character comes through. What is styled, or has several lines, is a Text of `lines`.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """A Text without any meaning in its characters."""
        return super().render_str(literal(text), **{**options, "markup": False, "emoji": False, "highlight": False})


def lines(*texts: str, style: str = "") -> Text:
    """Several lines as one, each shown literally."""
    return Text("\n".join(map(literal, texts)), style=style)


def _console(stderr: bool) -> LiteralConsole:
    stream = sys.stderr if stderr else sys.stdout
    terminal = stream is not None and stream.isatty()
    width = None if terminal or "COLUMNS" in os.environ else PIPED_WIDTH
    return LiteralConsole(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


out = _console(stderr=False)
err = _console(stderr=True)


JSON_SCHEMA = 1
"""Version of every command's --json. A key that goes or changes its meaning raises it; a new one does not."""


def print_json(value: Mapping[str, Any]) -> None:
    """Only this goes to stdout under --json: an object that begins with the version of its schema."""
    print(json.dumps({"schema": JSON_SCHEMA, **value}, indent=2, allow_nan=False))


def error(message: str) -> None:
    """One line on stderr, however long."""
    err.print(Text("error:", style="bold red"), message, soft_wrap=True)


def warning(message: str) -> None:
    """One line on stderr that stands out."""
    err.print(Text(" WARNING ", style="bold black on yellow"), message, style="bold yellow", soft_wrap=True)


def note(message: str) -> None:
    """One line on stderr."""
    err.print(message, style="dim", soft_wrap=True)


def table(
    title: str | Text | None, *columns: str, left: int = 1, wrap: int | None = None, caption: str | None = None
) -> Table:
    """A table whose first `left` columns are text and the others numbers; the first `wrap` (`left`) may wrap."""
    made = Table(title=title, caption=caption, title_justify="left", caption_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        keep = i >= (left if wrap is None else wrap)
        # a long name goes on in the next line rather than be cut
        made.add_column(column, justify="left" if i < left else "right", overflow="fold", no_wrap=keep)
    return made


class _Description(ProgressColumn):
    """What a bar is about."""

    def render(self, task: Task) -> Text:
        """The task's description, shown literally."""
        return lines(task.description)


@contextmanager
def bar(description: str, *, in_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar, which gets what is done and what there is to do; in bytes with rate and time left, or in steps.

    It moves to and fro until it gets them, and is gone at its end.
    """
    steps = (TaskProgressColumn(), TimeElapsedColumn())
    columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) if in_bytes else steps
    shown = Progress(_Description(), BarColumn(), *columns, console=err, disable=not err.is_terminal, transient=True)
    with shown:
        task = shown.add_task(description, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


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
