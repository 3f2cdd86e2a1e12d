"""The `fourbit` command. Each command has a module of its own, and imports torch only when it runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `fourbit` command."""
    from fourbit.cli import streams

    streams.prepare()
    from fourbit.cli import errors
    from fourbit.cli.app import app

    status: object = 0
    try:
        app(prog_name="fourbit")
    except SystemExit as end:
        status = end.code
    except BaseException as error:  # --debug lets them through
        errors.show(error)
        status = 1
    if not streams.finish():
        status = status or 1
    sys.exit(status)  # type: ignore[arg-type]
