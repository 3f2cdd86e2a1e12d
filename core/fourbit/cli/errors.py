"""What a user sees when a command fails: one line and exit status 1; usage errors are 2, Ctrl-C 130."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from fourbit.cli import console, streams

DEBUG_VARIABLE = "FOURBIT_DEBUG"

MOST_CHARACTERS = 10_000
"""Of a message that are shown: a file of 100 MB may have a name of 100 MB."""

P = ParamSpec("P")
R = TypeVar("R")

show_tracebacks = False
"""Set by --debug."""


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """The command, with its exceptions turned into one line on stderr and exit status 1."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt as stop:
            console.error(str(stop) or "interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # `fourbit inspect … | head`
            streams.abandon(sys.stdout)
            raise typer.Exit(1) from None
        except Exception as error:
            if show_tracebacks:
                raise
            say(error)
            raise typer.Exit(1) from None

    return run


def say(error: Exception) -> None:
    """An exception in one line on stderr, the beginning of it if it is very long."""
    text = in_one_line(error)
    console.error(text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …")


def show(error: BaseException) -> None:
    """The traceback, on stderr; what an exception says is no less a stranger's there."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        console.err.print(line, soft_wrap=True)


def in_one_line(error: Exception) -> str:
    """An exception's message, with its type in front where the message alone would not be understood."""
    if type(error).__module__.startswith("fourbit."):
        return str(error)  # in one line by itself: a line break in it is one in a name, and shown
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    # ours and the system's say what is the matter; others may be mere names
    if isinstance(error, (OSError, ValueError, RuntimeError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text} ({DEBUG_VARIABLE}=1 shows where)"
