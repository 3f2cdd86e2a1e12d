"""Options that several commands have, and the QuantConfig that they come to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourbit.cli import console

if TYPE_CHECKING:
    import torch

    from fourbit.config import QuantConfig

QuantType = Annotated[str, typer.Option("--quant-type", help="Data type: nf4, fp4, or one that a plugin adds.")]
Blocksize = Annotated[
    int | None,
    typer.Option(
        "--blocksize",
        help="Elements that share a scale: a power of two from 32 to 4096.",
        show_default="that of the device's backend",
    ),
]
DoubleQuant = Annotated[bool, typer.Option("--double-quant/--no-double-quant", help="Store the scales in 8 bits too.")]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Branch, tag or commit of a Hub's model, in the local Hub cache.", show_default="main"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]


def config(
    quant_type: str,
    blocksize: int | None,
    double_quant: bool,
    compute_dtype: str | None = None,
    skip: list[str] | None = None,
) -> QuantConfig:
    """The configuration that the options describe. A value that makes no sense is a usage error."""
    from fourbit.config import QuantConfig, as_compute_dtype

    try:
        dtype = as_compute_dtype(compute_dtype)
        return QuantConfig(quant_type, blocksize, double_quant, dtype, tuple(skip or ()))
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None


def device(name: str) -> torch.device:
    """The device of that name. A name that torch does not know is a usage error.

    Under torchrun, one without a number is each process's own: that of its LOCAL_RANK, modulo what there is.
    """
    import torch

    from fourbit.checkpoint.processes import from_environment

    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(str(error).splitlines()[0]) from None
    processes = from_environment()
    if processes is None or found.type == "cpu" or found.index is not None:
        return found
    module = torch.get_device_module(found)
    count = module.device_count() if hasattr(module, "device_count") else 0
    return torch.device(found.type, processes.local_rank % count) if count > 1 else found


def source(path: Path, revision: str | None = None, urls: bool = False) -> Path:
    """The folder or file that is meant; where it is another than what was named, in the Hub's cache, that is said.

    With `urls`, one of a folder may be named, too.
    """
    from fourbit.checkpoint.source import located
    from fourbit.checkpoint.urls import as_url

    if urls and as_url(path) is not None:
        if revision is not None:
            raise typer.BadParameter("a URL has no --revision; name it in the URL, as in hf://org/name@revision")
        return path
    found = located(path, revision)
    if found != path.expanduser():
        console.note(f"{path}: from the local Hub cache, revision {found.name} ({found})")
    return found
