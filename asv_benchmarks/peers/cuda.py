"""fourbit on an NVIDIA GPU beside torch bf16, bitsandbytes, torch's int4 (tinygemm) and the copy bandwidth.

`python asv_benchmarks/peers.py cuda`, or this file itself. Times are medians of replays of a CUDA graph whose calls
go through copies of the weight of at least 150 MB together, so that the second-level cache is cold; contenders take
turns. What cannot be captured is timed with events over the same calls.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fourbit

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672))
"""(out, in)."""

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 4096)
BLOCKSIZE = 64
COLD_BYTES = 150_000_000
ROUNDS = 15

Call = Callable[[], object]


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


@dataclass
class Contender:
    """Calls of one contender, each on another copy of the weight, and the bytes that one has to move."""

    calls: list[Call]
    bytes: float
    replay: Call | None = None
    note: str = ""
    samples: list[float] = field(default_factory=list)

    def prepare(self) -> None:
        """Warm up and capture; falls back to plain calls."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in self.calls[:2]:
                call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                for call in self.calls:
                    call()
            self.replay = graph.replay
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.note = f"events, no graph: {str(error).splitlines()[0][:60]}"
            self.replay = lambda: [call() for call in self.calls]
        self.replay()
        torch.cuda.synchronize()

    def run(self) -> None:
        """One timed replay."""
        assert self.replay is not None
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.replay()
        end.record()
        end.synchronize()
        self.samples.append(start.elapsed_time(end) * 1e3 / len(self.calls))


def measure(contenders: dict[str, Contender], rounds: int) -> dict[str, tuple[float, float, str]]:
    """`{name: (median microseconds, GB/s, note)}`, the contenders in turn."""
    for contender in contenders.values():
        contender.prepare()
    for _ in range(rounds):
        for contender in contenders.values():
            contender.run()
    return {
        name: (m := median(c.samples), c.bytes / m / 1e3, c.note)  # bytes a microsecond are MB/s
        for name, c in contenders.items()
    }


def copies(nbytes: int) -> int:
    """How many copies of a weight of `nbytes` leave no useful part of it in a cache."""
    return max(4, -(-COLD_BYTES // nbytes))


def copy_bandwidth(rounds: int) -> float:
    """GB/s, read plus written, of the faster of a copy by kernel and by the driver."""
    source = torch.randint(0, 1 << 30, (1 << 27,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    moved = 2.0 * source.numel() * 4
    by_kernel = Contender([lambda: torch.bitwise_not(source, out=target)], moved)
    by_driver = Contender([lambda: target.copy_(source)], moved)
    return max(speed for _, speed, _ in measure({"kernel": by_kernel, "driver": by_driver}, rounds).values())


class Weights:
    """One weight for all contenders, in as many copies as each needs."""

    def __init__(self, n: int, k: int) -> None:
        torch.manual_seed(n + k)
        self.n, self.k = n, k
        self.dense = torch.randn(n, k, dtype=torch.bfloat16, device="cuda") * 0.02
        self.bf16 = [self.dense.clone() for _ in range(copies(2 * n * k))]
        self.count = copies(n * k * 9 // 16)
        self.fourbit: dict[bool, list[tuple[Tensor, Any]]] = {False: [], True: []}
        for double in (False, True):
            packed, state = fourbit.quantize_4bit(self.dense, blocksize=BLOCKSIZE, double_quant=double)
            self.fourbit[double] = [(packed.clone(), _cloned(state)) for _ in range(self.count)]
        self.bitsandbytes: dict[bool, list[tuple[Tensor, Any]]] = {False: [], True: []}
        if bnb is not None:
            for double in (False, True):
                make = bnb.functional.quantize_4bit
                for _ in range(self.count):
                    part = make(self.dense, blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=double)
                    self.bitsandbytes[double].append(part)
        self.tinygemm = self._tinygemm()

    def _tinygemm(self) -> list[tuple[Tensor, Tensor]]:
        try:
            raw = torch.randint(0, 256, (self.n, self.k // 2), dtype=torch.uint8, device="cuda")
            packed = torch._convert_weight_to_int4pack(raw, 8)
            scales = torch.rand(self.k // BLOCKSIZE, self.n, 2, dtype=torch.bfloat16, device="cuda")
            return [(packed.clone(), scales.clone()) for _ in range(self.count)]
        except (RuntimeError, AttributeError) as error:
            print(f"no tinygemm: {error}", file=sys.stderr)
            return []


def _cloned(state: Any) -> Any:
    from dataclasses import replace

    nested = {} if state.nested_absmax is None else {"nested_absmax": state.nested_absmax.clone()}
    return replace(state, absmax=state.absmax.clone(), **nested)


def _import_bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except Exception as error:  # whatever keeps it from loading, the table goes on without it
        print(f"no bitsandbytes: {error}", file=sys.stderr)
        return None
    return bitsandbytes


bnb: Any = None


def weight_bytes(n: int, k: int, double: bool) -> float:
    """Bytes of a 4-bit weight with its scales."""
    scales = n * k / BLOCKSIZE
    return n * k / 2 + (scales + 4 * scales / 256 if double else 4 * scales)


def linear_contenders(w: Weights, m: int) -> dict[str, Contender]:
    """Who multiplies x [m, k] by the transposed weight."""
    n, k = w.n, w.k
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    io = 2.0 * m * (n + k)
    linear = torch.nn.functional.linear
    found = {"torch bf16": Contender([lambda w=w: linear(x, w) for w in w.bf16], 2.0 * n * k + io)}
    for double in (False, True):
        name = " double" if double else ""
        moved = weight_bytes(n, k, double) + io
        ours = [lambda p=p, s=s: fourbit.linear_4bit(x, p, s) for p, s in w.fourbit[double]]
        found["fourbit" + name] = Contender(ours, moved)
        if w.bitsandbytes[double]:
            theirs = [lambda p=p, s=s: bnb.matmul_4bit(x, p.t(), quant_state=s) for p, s in w.bitsandbytes[double]]
            found["bitsandbytes" + name] = Contender(theirs, moved)
    if w.tinygemm and m <= 512:
        run = torch.ops.aten._weight_int4pack_mm
        found["tinygemm int4"] = Contender([lambda p=p, s=s: run(x, p, BLOCKSIZE, s) for p, s in w.tinygemm], io)
    return found


def elementwise_contenders(w: Weights) -> dict[str, Contender]:
    """Who quantizes and dequantizes."""
    n, k = w.n, w.k
    dense = 2.0 * n * k
    found = {}
    quantize = [lambda d=d: fourbit.quantize_4bit(d, blocksize=BLOCKSIZE) for d in w.bf16]
    found["quantize fourbit"] = Contender(quantize, dense + weight_bytes(n, k, False))
    if bnb is not None:
        make = bnb.functional.quantize_4bit
        found["quantize bitsandbytes"] = Contender(
            [lambda d=d: make(d, blocksize=BLOCKSIZE, quant_type="nf4") for d in w.bf16],
            dense + weight_bytes(n, k, False),
        )
    for double in (False, True):
        name = "dequantize double " if double else "dequantize "
        moved = dense + weight_bytes(n, k, double)
        ours = [lambda p=p, s=s: fourbit.dequantize_4bit(p, s) for p, s in w.fourbit[double]]
        found[name + "fourbit"] = Contender(ours, moved)
        if bnb is not None:
            undo = bnb.functional.dequantize_4bit
            theirs = [lambda p=p, s=s, undo=undo: undo(p, s) for p, s in w.bitsandbytes[double]]
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
    rows = sorted(
        {(r.shape, r.rows) for r in results if r.table == "linear"}, key=lambda at: (SHAPES.index(at[0]), at[1])
    )
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


def setting() -> dict[str, str]:
    """Versions and the device."""
    properties = torch.cuda.get_device_properties(0)
    versions = {"torch": torch.__version__, "fourbit": fourbit.__version__, "device": properties.name}
    versions["multiprocessors"] = str(properties.multi_processor_count)
    if bnb is not None:
        versions["bitsandbytes"] = bnb.__version__
    try:
        from cuda.bindings import driver, nvrtc

        versions["driver's CUDA"] = str(driver.cuDriverGetVersion()[1])
        versions["NVRTC"] = ".".join(map(str, nvrtc.nvrtcVersion()[1:]))
    except ImportError:
        pass
    return versions


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the tables; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="peers.py cuda", description=__doc__)
    parser.add_argument("--shapes", default="", help="such as 8192x8192,28672x8192 (out x in); default: six")
    parser.add_argument("--rows", default="", help="of x, such as 1,16; default: " + ",".join(map(str, ROWS)))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed replays of each contender")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("peers.py cuda: no CUDA device")
    global bnb
    bnb = _import_bitsandbytes()
    shapes = [tuple(map(int, s.split("x"))) for s in options.shapes.split(",") if s] or list(SHAPES)
    rows = [int(m) for m in options.rows.split(",") if m] or list(ROWS)
    print(", ".join(f"{name} {value}" for name, value in setting().items()), flush=True)
    copy = copy_bandwidth(options.rounds)
    print(f"copy bandwidth {copy:.0f} GB/s, read and written", flush=True)
    results: list[Result] = []
    for n, k in shapes:
        with torch.inference_mode():
            w = Weights(n, k)
            for m in rows:
                for who, (us, speed, note) in measure(linear_contenders(w, m), options.rounds).items():
                    results.append(Result("linear", (n, k), m, who, us, speed, note))
            for who, contender in elementwise_contenders(w).items():
                for _, (us, speed, note) in measure({who: contender}, options.rounds).items():
                    results.append(Result("elementwise", (n, k), 0, who, us, speed, note))
            torch.cuda.synchronize()
        if options.json:
            content = {"setting": setting(), "copy": copy, "results": [vars(r) for r in results]}
            options.json.write_text(json.dumps(content, indent=1))
        done = [r for r in results if r.shape == (n, k)]
        print(linear_table(done, copy) + "\n\n" + elementwise_table(done, copy) + "\n", flush=True)
        del w
        torch.cuda.empty_cache()
    notes = sorted({f"{r.who}: {r.note}" for r in results if r.note})
    print("\n".join(notes))


if __name__ == "__main__":
    main()
