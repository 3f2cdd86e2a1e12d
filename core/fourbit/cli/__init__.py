"""The `fourbit` command. Each command has a module of its own, and imports torch only when it runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `fourbit` command."""
    from fourbit.cli import streams

    streams.prepare()
    status = _status()
    fault = streams.finish()
    if fault is not None and not status:
        status = 1
        if not isinstance(fault, BrokenPipeError):
            from fourbit.cli import errors

            errors.say(fault)
            streams.finish()
    sys.exit(status)


def _status() -> int:
    from fourbit.cli import errors
    from fourbit.cli.app import app

    try:
        try:
            app(prog_name="fourbit")
        except Exception as error:  # --debug lets them through
            errors.show(error)
            return 1
    except SystemExit as end:  # rich ends so where a pipe is closed
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except OSError:  # a pipe is closed, or a disk full, where the traceback goes
        return 1
    return 0
