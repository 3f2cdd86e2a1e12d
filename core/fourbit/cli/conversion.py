"""What `quantize` and `dequantize` have in common: the options, the bar, Ctrl-C, and the first lines of the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from fourbit.cli import console

if TYPE_CHECKING:
    from fourbit.checkpoint.conversion import Report

R = TypeVar("R")

Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--overwrite",
        help="Continue an interrupted run where it was, or start afresh and replace DST if it is a model folder"
        " with nothing else in it.",
        show_default="neither: an error if DST or an interrupted run is there",
    ),
]

MaxShardSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Most that a weight file may have, such as 5GB, 500MB or 2GiB; one weight that is larger has a file for"
        " itself.",
        show_default="5GB",
    ),
]


def check_size(size: str | None) -> str | None:
    """The size of weight files; what is none is a usage error."""
    from fourbit.checkpoint.file_layout import parse_size

    try:
        parse_size(size)
    except ValueError as error:
        raise typer.BadParameter(str(error).replace("max_shard_size", "--max-shard-size")) from None
    return size


@contextmanager
def checking(dst: Path) -> Iterator[None]:
    """Around what is checked before `run`: under torchrun the other processes, which would wait, hear of its error."""
    try:
        yield
    except Exception as error:
        from fourbit.checkpoint import early
        from fourbit.checkpoint.processes import from_environment
        from fourbit.checkpoint.urls import as_url

        processes = from_environment()
        if processes is not None and as_url(dst) is None:
            early.tell(dst.expanduser().resolve(), processes, error)
        raise


def run(verb: str, convert: Callable[..., R], dst: Path, resume: bool | None) -> R:
    """Call `quantize_checkpoint` or `dequantize_checkpoint`, the rest of its arguments given, with a bar.

    Ctrl-C says what continues it. Under torchrun all processes do it together.
    """
    from fourbit.checkpoint.destination import unfinished_folder
    from fourbit.checkpoint.processes import from_environment

    processes = from_environment()
    if processes is not None:
        convert = partial(convert, processes=processes)
        if processes.leads:
            console.note(f"{processes.count} processes do this together")

    with console.bar(verb, in_bytes=True) as advance:

        def progress(name: str, done: int, total: int) -> None:
            advance(done, total)

        try:
            return convert(dst=dst, overwrite=resume is False, resume=resume is True, progress=progress)
        except KeyboardInterrupt:
            if unfinished_folder(dst.expanduser().resolve()).is_dir():
                raise KeyboardInterrupt("interrupted; the same command with --resume continues") from None
            raise


def reports() -> bool:
    """Whether this process says what all have done: under torchrun only the one with rank 0 does."""
    from fourbit.checkpoint.processes import from_environment

    processes = from_environment()
    return processes is None or processes.leads


def show(report: Report) -> None:
    """What was read and written, and what was not."""
    console.out.print(
        f"{report.source} -> {report.destination}"
        f" in {report.seconds:.1f} s; {len(report.files)} weight file(s), {len(report.copied)} other file(s) copied",
        soft_wrap=True,
    )
    if report.resumed_bytes:
        done = f"{console.size(report.resumed_bytes)} of {console.size(report.bytes_before)}"
        console.note(f"resumed: an earlier run had done {done}")
    if report.left_out:
        names = ", ".join(report.left_out)
        console.note(f"not copied, since they hold weights in another form, or of another model: {names}")
    for name, reason in report.skipped.items():
        console.warning(f"not copied: {name}, {reason}")
    for path in report.leftovers:
        console.note(f"left over from this run or an earlier one; remove it if you do not need it: {path}")
