"""fourbit on an NVIDIA GPU beside torch bf16, bitsandbytes, torch's int4 (tinygemm) and the copy bandwidth.

`python -m peers cuda`. Times are medians of replays of a CUDA graph whose calls
go through copies of the weight of at least 150 MB together, so that the second-level cache is cold; contenders take
turns. What cannot be captured is timed with events over the same calls.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fourbit
from harness import bnb
from harness.arguments import numbers, shapes
from harness.graphs import COLD_BYTES, Contender, copy_bandwidth, measure
from harness.weights import BLOCKSIZE, Weights, stored_bytes

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672))
"""(out, in)."""

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 4096)
ROUNDS = 15


@dataclass
class Result:
    """One measured number.

    Attributes:
        table: which table it belongs to.
        shape: (out, in) of the weight.
        rows: of x, 0 where there is no x.
        who: the contender.
        microseconds: median of a call.
        gigabytes: per second, of what the call has to move at least.
        note: how it was timed, if not by graph replay.
    """

    table: str
    shape: tuple[int, int]
    rows: int
    who: str
    microseconds: float
    gigabytes: float
    note: str = ""


class CudaWeights(Weights):
    """With the forms of the peers that run on an NVIDIA GPU."""

    cold_bytes = COLD_BYTES

    def bitsandbytes(self, double: bool, dtype: str = "bf16") -> list[tuple[Tensor, Any]]:
        """`(packed, state)`; empty where it is not installed."""
        if self.bnb is None:
            return []

        def build() -> tuple[Any, int]:
            quantize = self.bnb.functional.quantize_4bit
            packed, state = quantize(
                self.torch(dtype)[0], blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=double
            )
            return (packed, state), packed.nbytes + state.absmax.nbytes

        return self.copies(f"bitsandbytes {double} {dtype}", build)

    def tinygemm(self) -> list[tuple[Tensor, Tensor]]:
        """`(packed, scales and zeros)` of torch's own 4-bit product; empty where it has none."""

        def build() -> tuple[Any, int]:
            n, k = self.shape
            raw = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
            packed = torch._convert_weight_to_int4pack(raw, 8)
            scales = torch.rand(k // BLOCKSIZE, n, 2, dtype=torch.bfloat16, device="cuda")
            return (packed, scales), packed.nbytes + scales.nbytes

        try:
            return self.copies("tinygemm", build)
        except (RuntimeError, AttributeError) as error:
            print(f"no tinygemm: {error}", file=sys.stderr)
            return []


def linear_contenders(w: CudaWeights, m: int) -> dict[str, Contender]:
    """Who multiplies x [m, k] by the transposed weight."""
    n, k = w.shape
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    io = 2.0 * m * (n + k)
    linear = torch.nn.functional.linear
    found = {"torch bf16": Contender([lambda d=d: linear(x, d) for d in w.torch("bf16")], 2.0 * n * k + io)}
    for double in (False, True):
        name = " double" if double else ""
        moved = stored_bytes(*w.fourbit(double)[0]) + io
        ours = [lambda p=p, s=s: fourbit.linear_4bit(x, p, s) for p, s in w.fourbit(double)]
        found["fourbit" + name] = Contender(ours, moved)
        if w.bnb is not None:
            theirs = [lambda p=p, s=s: w.bnb.matmul_4bit(x, p.t(), quant_state=s) for p, s in w.bitsandbytes(double)]
            found["bitsandbytes" + name] = Contender(theirs, moved)
    run = torch.ops.aten._weight_int4pack_mm
    calls = [lambda p=p, s=s: run(x, p, BLOCKSIZE, s) for p, s in w.tinygemm()] if m <= 512 else []
    if calls:
        found["tinygemm int4"] = Contender(calls, io)
    return found


def elementwise_contenders(w: CudaWeights) -> dict[str, Contender]:
    """Who quantizes and dequantizes."""
    plain = w.torch("bf16")
    dense = float(plain[0].nbytes)
    found = {}
    quantize = [lambda d=d: fourbit.quantize_4bit(d, blocksize=BLOCKSIZE) for d in plain]
    found["quantize fourbit"] = Contender(quantize, dense + stored_bytes(*w.fourbit()[0]))
    if w.bnb is not None:
        make = w.bnb.functional.quantize_4bit
        found["quantize bitsandbytes"] = Contender(
            [lambda d=d: make(d, blocksize=BLOCKSIZE, quant_type="nf4") for d in plain],
            dense + stored_bytes(*w.fourbit()[0]),
        )
    for double in (False, True):
        name = "dequantize double " if double else "dequantize "
        moved = dense + stored_bytes(*w.fourbit(double)[0])
        ours = [lambda p=p, s=s: fourbit.dequantize_4bit(p, s, torch.bfloat16) for p, s in w.fourbit(double)]
        found[name + "fourbit"] = Contender(ours, moved)
        if w.bnb is not None:
            undo = w.bnb.functional.dequantize_4bit
            theirs = [lambda p=p, s=s, undo=undo: undo(p, s) for p, s in w.bitsandbytes(double)]
            found[name + "bitsandbytes"] = Contender(theirs, moved)
    return found


def linear_table(results: list[Result], copy: float) -> str:
    """Markdown: microseconds, and for fourbit the ratios."""
    names = ("torch bf16", "bitsandbytes", "bitsandbytes double", "tinygemm int4", "fourbit", "fourbit double")
    lines = [
        "| out x in | rows | " + " | ".join(f"{name} us" for name in names) + " | x bf16 | double: x bf16"
        " | x bitsandbytes | % of copy | double: % of copy |",
        "|---|---|" + "---|" * (len(names) + 5),
    ]
    rows = sorted({(r.shape, r.rows) for r in results if r.table == "linear"})
    for shape, m in rows:
        by_name = {r.who: r for r in results if (r.table, r.shape, r.rows) == ("linear", shape, m)}
        cells = [f"{by_name[name].microseconds:.1f}" if name in by_name else "–" for name in names]
        base, ours, double = by_name["torch bf16"], by_name["fourbit"], by_name["fourbit double"]
        theirs = by_name.get("bitsandbytes")
        cells += [f"{base.microseconds / ours.microseconds:.2f}", f"{base.microseconds / double.microseconds:.2f}"]
        cells.append(f"{theirs.microseconds / ours.microseconds:.2f}" if theirs else "–")
        cells += [f"{100 * ours.gigabytes / copy:.0f}", f"{100 * double.gigabytes / copy:.0f}"]
        lines.append(f"| {shape[0]} x {shape[1]} | {m} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def elementwise_table(results: list[Result], copy: float) -> str:
    """Markdown: GB/s and percent of the copy bandwidth."""
    lines = ["| out x in | what | us | GB/s | % of copy |", "|---|---|---|---|---|"]
    for r in results:
        if r.table == "elementwise":
            share = 100 * r.gigabytes / copy
            size = f"{r.shape[0]} x {r.shape[1]}"
            lines.append(f"| {size} | {r.who} | {r.microseconds:.1f} | {r.gigabytes:.0f} | {share:.0f} |")
    return "\n".join(lines)


def setting(library: Any) -> dict[str, str]:
    """Versions and the device."""
    properties = torch.cuda.get_device_properties(0)
    versions = {"torch": torch.__version__, "fourbit": fourbit.__version__, "device": properties.name}
    versions["multiprocessors"] = str(properties.multi_processor_count)
    if library is not None:
        versions["bitsandbytes"] = library.__version__
    try:
        from cuda.bindings import driver, nvrtc

        versions["driver's CUDA"] = str(driver.cuDriverGetVersion()[1])
        versions["NVRTC"] = ".".join(map(str, nvrtc.nvrtcVersion()[1:]))
    except ImportError:
        pass
    return versions


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the tables; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m peers cuda", description=__doc__)
    parser.add_argument("--shapes", type=shapes, default=SHAPES, help="out x in, such as 8192x8192,28672x8192")
    parser.add_argument("--rows", type=numbers, default=ROWS, help="of x, such as 1,16")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed replays of each contender")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("python -m peers cuda: no CUDA device")
    library = bnb.load()
    print(", ".join(f"{name} {value}" for name, value in setting(library).items()), flush=True)
    copy = copy_bandwidth(options.rounds)
    print(f"copy bandwidth {copy:.0f} GB/s, read and written", flush=True)
    results: list[Result] = []
    for n, k in options.shapes:
        with torch.inference_mode():
            w = CudaWeights((n, k), library, seed=n + k, device="cuda")
            for m in options.rows:
                for who, (us, speed, note) in measure(linear_contenders(w, m), options.rounds).items():
                    results.append(Result("linear", (n, k), m, who, us, speed, note))
            for who, contender in elementwise_contenders(w).items():
                for _, (us, speed, note) in measure({who: contender}, options.rounds).items():
                    results.append(Result("elementwise", (n, k), 0, who, us, speed, note))
            torch.cuda.synchronize()
        if options.json:
            content = {"setting": setting(library), "copy": copy, "results": [vars(r) for r in results]}
            options.json.write_text(json.dumps(content, indent=1))
        done = [r for r in results if r.shape == (n, k)]
        print(linear_table(done, copy) + "\n\n" + elementwise_table(done, copy) + "\n", flush=True)
        del w
        torch.cuda.empty_cache()
    notes = sorted({f"{r.who}: {r.note}" for r in results if r.note})
    print("\n".join(notes))


if __name__ == "__main__":
    main()
