"""`fourbit dequantize`: a 4-bit model folder back in 16 or 32 bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fourbit.cli import console, conversion, options


def dequantize(
    src: Annotated[
        Path, typer.Argument(metavar="SRC", help="4-bit folder of fourbit or bitsandbytes, or one .safetensors file.")
    ],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="New folder for the 16- or 32-bit model.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the dequantized weights: bfloat16, float16 or float32.",
            show_default="of each weight before it was quantized",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to dequantize: cpu, cuda, cuda:1 …")] = "cpu",
    max_shard_size: conversion.MaxShardSize = None,
    revision: options.Revision = None,
    resume: conversion.Resume = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a copy of the 4-bit model folder SRC to DST with plain 16- or 32-bit weights.

    The copy loads wherever a model that was never quantized does; the precision that quantizing took away does
    not come back. Tensors that were not in 4 bits are carried over byte for byte. DST appears only when all of
    it is there and was read back; an interrupted run can be continued with --resume.
    """
    from fourbit.checkpoint.dequantize import dequantize_checkpoint
    from fourbit.config import as_compute_dtype

    with conversion.checking(dst):
        try:
            kind = as_compute_dtype(dtype)
        except (TypeError, ValueError) as error:
            raise typer.BadParameter(str(error).replace("compute_dtype", "--dtype")) from None
        where = options.device(device)
        size = conversion.check_size(max_shard_size)
        src = options.source(src, revision, urls=True)
    convert = partial(dequantize_checkpoint, src, dtype=kind, device=where, max_shard_size=size)
    report = conversion.run("dequantizing", convert, dst, resume)
    if not conversion.reports():
        return
    if as_json:
        console.print_json(report.to_dict())
        return
    conversion.show(report)
    console.out.print(
        f"{len(report.dequantized)} weights dequantized, {len(report.carried)} other tensors carried over;"
        f" {report.bytes_before:,} -> {report.bytes_after:,} bytes",
        soft_wrap=True,
    )
