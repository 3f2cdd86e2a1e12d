"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from fourbit.cli import console, errors
from fourbit.cli.backends import backends
from fourbit.cli.compare import compare
from fourbit.cli.demo import demo
from fourbit.cli.dequantize import dequantize
from fourbit.cli.estimate import estimate
from fourbit.cli.inspect import inspect
from fourbit.cli.quantize import quantize
from fourbit.cli.verify import verify

app = typer.Typer(
    name="fourbit",
    help="4-bit quantization of model weights (NF4, FP4, double quantization), on whatever device there is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # errors.py shows them
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (quantize, dequantize, inspect, verify, compare, estimate, backends, demo):
    # one line a paragraph, for the terminal to break
    text = "\n\n".join(" ".join(part.split()) for part in (command.__doc__ or "").split("\n\n"))
    app.command(help=text)(errors.reported(command))


def _version(value: bool) -> None:
    if value:
        from fourbit.version import __version__

        console.out.print(f"fourbit {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar=errors.DEBUG_VARIABLE, help="Show tracebacks of errors.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before the command."""
    errors.show_tracebacks = debug
