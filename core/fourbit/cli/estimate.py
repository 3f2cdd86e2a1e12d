"""`fourbit estimate`: how large a model gets, for each setting."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from fourbit.cli import console, options

PEAK_TENSORS = 3
PEAK_BASE = 500_000_000
"""What `quantize` may take: so many times the largest tensor, and so many bytes for Python and torch."""

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Estimate:
    """One setting: bytes of the quantized part, of the parts that stay as they are, and of all.

    `resident_bytes` are those of the loaded weights: all of it, with the code tables of each weight.
    """

    quant_type: str
    blocksize: int
    double_quant: bool
    quantized_bytes: int
    other_bytes: int
    bytes: int
    resident_bytes: int
    bits_per_quantized_parameter: float
    bits_per_parameter: float


def estimate(
    folder: Annotated[Path | None, typer.Argument(metavar="[MODEL_FOLDER]", help="Folder of safetensors.")] = None,
    params: Annotated[str | None, typer.Option(help="A number of parameters instead, such as 70e9 or 7B.")] = None,
    revision: options.Revision = None,
    as_json: options.AsJson = False,
) -> None:
    """Compute bytes and bits per parameter for each data type, blocksize and double-quantization setting.

    Of a folder only the headers are read; what stays in 16 bit (embeddings, norms, output head) is counted
    apart, and the memory that quantizing it takes is said too. With --params all parameters count as quantized.
    """
    if (folder is None) == (params is None):
        raise typer.BadParameter("give either MODEL_FOLDER or --params")
    if folder is not None:
        tensors, other, other_bytes, before, largest = _of_folder(options.source(folder, revision))
    else:
        assert params is not None
        tensors, largest = [parse_count(params)], None
        other, other_bytes, before = 0, 0, 2 * tensors[0]
    found = list(estimates(tensors, other, other_bytes))
    peak = None if largest is None else peak_while_quantizing(largest)
    if as_json:
        value = {
            "quantized_parameters": sum(tensors),
            "other_parameters": other,
            "bytes_before": before,
            "largest_tensor_bytes": largest,
            "peak_quantizing_bytes": peak,
            "settings": [asdict(e) for e in found],
        }
        console.print_json(value)
        return
    _show(found, sum(tensors), other, other_bytes, before, str(folder) if folder else None)
    if largest is not None and peak is not None:
        console.out.print(
            f"Memory while quantizing: at most {peak:,} bytes, {PEAK_TENSORS} times the largest tensor"
            f" ({largest:,}) and {PEAK_BASE:,}, whatever the setting. Loaded weights take the whole model's bytes;"
            " activations and the cache of attention come on top.",
            soft_wrap=True,
        )


def peak_while_quantizing(largest: int) -> int:
    """The bound on the memory of `fourbit quantize`, in bytes, for a model whose largest tensor has `largest`."""
    return PEAK_TENSORS * largest + PEAK_BASE


def parse_count(text: str) -> int:
    """A number of parameters: "70e9", "7B", "135M", "1_000_000". What is none is a usage error."""
    match = re.fullmatch(r"\s*([0-9][0-9_]*\.?[0-9]*(?:[eE]\+?[0-9]{1,2})?)\s*([KMBGTkmbgt]?)\s*", text)
    count = round(float(match[1]) * _SUFFIXES[match[2].upper()]) if match else 0
    if not 1 <= count <= 10**18:
        raise typer.BadParameter(f"{text!r} is not a number of parameters; want for example 70e9, 7B or 135M")
    return count


def estimates(tensors: list[int], other: int, other_bytes: int) -> Iterator[Estimate]:
    """Every setting, for quantized tensors of the given sizes beside `other` parameters of `other_bytes`."""
    from fourbit import checks, codebooks
    from fourbit.state import quantized_nbytes

    count = sum(tensors)
    sizes = [1 << i for i in range(checks.MIN_BLOCKSIZE.bit_length() - 1, checks.MAX_BLOCKSIZE.bit_length())]
    for quant_type in sorted(codebooks.known(), key=lambda name: (name != "nf4", name)):
        for double_quant in (False, True):
            for size in sizes:
                nbytes = sum(quantized_nbytes(n, size, double_quant) for n in tensors)
                total = nbytes + other_bytes
                bits = 8 * nbytes / count if count else 0.0
                whole = 8 * total / (count + other) if count + other else 0.0
                resident = total + len(tensors) * _table_bytes(double_quant)
                yield Estimate(quant_type, size, double_quant, nbytes, other_bytes, total, resident, bits, whole)


def _table_bytes(double_quant: bool) -> int:
    """Bytes of the code tables that a loaded weight has beside its codes and scales."""
    from fourbit import codebooks

    return codebooks.get("nf4").tensor().nbytes + (codebooks.dynamic_map().nbytes if double_quant else 0)


def _of_folder(folder: Path) -> tuple[list[int], int, int, int, int]:
    from fourbit.checkpoint.compound import Compound
    from fourbit.checkpoint.plan import combined
    from fourbit.checkpoint.quantize import checked_plans
    from fourbit.config import QuantConfig

    with Compound(folder) as source:
        largest = max((info.nbytes for info in source.entries.values()), default=0)
        planned = combined(source, checked_plans(source, QuantConfig(), "cpu"))
    other = sum(t.parameters for t in planned.skipped)
    other_bytes = sum(t.bytes_after for t in planned.skipped)
    return [t.parameters for t in planned.quantized], other, other_bytes, planned.bytes_before, largest


def _show(found: list[Estimate], count: int, other: int, other_bytes: int, before: int, folder: str | None) -> None:
    columns = ["data type", "double quantization", "blocksize", "bits per quantized parameter", "quantized part"]
    if folder is not None:
        columns += ["whole model", "bits per parameter of the whole"]
    title = f"{folder}: " if folder else ""
    title += f"{count:,} parameters to quantize"
    if folder is not None:
        title += f", {other:,} that stay as they are ({other_bytes:,} bytes); today {before:,} bytes"
    else:
        title += f"; {before:,} bytes in 16 bit"
    table = console.table(title, *columns, left=2)
    # every 4-bit data type takes the same room: one group of rows for all
    names = ", ".join(dict.fromkeys(e.quant_type for e in found))
    first = [e for e in found if e.quant_type == found[0].quant_type]
    for i, e in enumerate(first):
        if i and e.double_quant != first[i - 1].double_quant:
            table.add_section()
        cells = [names, "yes" if e.double_quant else "no", str(e.blocksize)]
        cells += [f"{e.bits_per_quantized_parameter:.6f}", f"{e.quantized_bytes:,}"]
        if folder is not None:
            cells += [f"{e.bytes:,}", f"{e.bits_per_parameter:.6f}"]
        table.add_row(*cells)
    console.out.print(table)
