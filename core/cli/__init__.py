"""The `fourbit` command. Each command has a module of its own, and imports torch only when it runs."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `fourbit` command."""
    from fourbit.cli.app import app

    app(prog_name="fourbit")
