"""The commands, put together: core's own, and those that plugins add."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from fourbit.cli import console, errors
from fourbit.cli.backends import backends
from fourbit.cli.compare import compare
from fourbit.cli.dequantize import dequantize
from fourbit.cli.estimate import estimate
from fourbit.cli.inspect import inspect
from fourbit.cli.quantize import quantize
from fourbit.cli.verify import verify

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "fourbit.commands"
"""The entry points of plugins' commands: functions with a docstring and typer's annotations, as core's own are.

One is imported when it is called, and all are when their list is shown.
"""


class Commands(TyperGroup):
    """Core's commands, and then those of plugins."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names."""
        self._add(_plugins())
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; None if there is none."""
        if cmd_name not in self.commands:
            found = _plugins()
            self._add({cmd_name: found[cmd_name]} if cmd_name in found else found)  # all, for "Did you mean"
        return super().get_command(ctx, cmd_name)

    def _add(self, plugins: Mapping[str, EntryPoint]) -> None:
        for name, entry_point in plugins.items():
            if name not in self.commands:
                self.commands[name] = _imported(name, entry_point)


app = typer.Typer(
    name="fourbit",
    cls=Commands,
    help="4-bit quantization of model weights (NF4, FP4, double quantization), on whatever device there is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # errors.py shows them
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(to: typer.Typer, command: Callable[..., None], name: str | None = None, **settings: Any) -> None:
    # one line a paragraph, for the terminal to break
    text = "\n\n".join(" ".join(part.split()) for part in (command.__doc__ or "").split("\n\n"))
    to.command(name, help=text, **settings)(errors.reported(command))


def _plugins() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {ep.name: ep for ep in sorted(entry_points(group=GROUP), key=lambda ep: ep.name)}


def _imported(name: str, entry_point: EntryPoint) -> Any:
    """A plugin's command; if it cannot be had, one that says why when it is called."""
    alone = typer.Typer(add_completion=False)
    try:
        _add(alone, entry_point.load(), name)
        return typer.main.get_command(alone)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # such as a panic of a library in Rust
        reason = error

    def broken(context: typer.Context) -> None:
        """This command of a plugin cannot be imported; to call it says why."""
        what = f"the command {name} ({entry_point.value}) cannot be imported"
        raise ImportError(f"{what}: {type(reason).__name__}: {reason}") from reason

    alone = typer.Typer(add_completion=False)
    _add(alone, broken, name, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
    return typer.main.get_command(alone)


for own in (quantize, dequantize, inspect, verify, compare, estimate, backends):
    _add(app, own)


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
