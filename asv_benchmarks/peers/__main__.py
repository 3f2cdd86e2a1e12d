"""fourbit beside its peers, in one process: times, ratios, and how they stand to the targets.

    python -m peers cpu                  # everything, about 10 minutes
    python -m peers cpu --quick          # one shape, about a minute
    python -m peers cpu --cases linear --shapes 4096x4096 --m 1,4 --threads 1 --dtype bf16
    python -m peers cpu --isa avx2       # fourbit, torch and oneDNN held to AVX2
    python -m peers cpu --sweep          # every M against dequantize_4bit + torch's linear
    python -m peers cuda                 # an NVIDIA GPU: peers/cuda.py, with options of its own
    python -m peers rows                 # more of it: rows, experts, training, model, each a file here

The CPU's peers are torch's linear, bitsandbytes' packed path (if installed) and torch's int4pack; harness/timing.py
says how they are timed. A ratio is a peer's median over fourbit's: above 1, fourbit is faster.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys

from harness.arguments import numbers, shapes, words

ISA_LIMITS = {
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "scalar": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
"""What holds torch and its libraries to an instruction set. bitsandbytes' kernels cannot be held back."""

ON_GPU = ("cuda", "rows", "experts", "training", "model")
"""Modules here with command lines of their own."""

SHAPES = "4096x4096,11008x4096,4096x14336,32000x4096"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m peers", description="Time fourbit beside its peers.")
    parser.add_argument("device", choices=["cpu", *ON_GPU], help="all but cpu have options of their own")
    parser.add_argument(
        "--cases", type=words, help="of linear, fp16, gradient, quantize, dequantize, blockwise, module"
    )
    parser.add_argument("--shapes", type=shapes, help=f"NxK of the weights (default {SHAPES})")
    parser.add_argument("--m", type=numbers, default=(1, 4, 16, 128, 512), help="rows of x")
    parser.add_argument("--threads", type=numbers, default=(1, 2))
    parser.add_argument("--dtype", type=words, default=("bf16", "fp32"), help="of x in the case linear, and the sweep")
    parser.add_argument("--isa", choices=sorted(ISA_LIMITS), help="hold fourbit and torch to an instruction set")
    parser.add_argument("--sweep", action="store_true", help="every M against dequantize + torch, instead of the cases")
    parser.add_argument("--quick", action="store_true", help="one shape and few rounds: a look, not a result")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured there too")
    found = parser.parse_args(argv)
    if found.shapes is None:
        found.shapes = shapes("4096x4096" if found.quick or found.sweep else SHAPES)
    if not set(found.dtype) <= {"bf16", "fp32", "fp16"}:
        parser.error(f"--dtype takes bf16, fp32 and fp16, not {','.join(found.dtype)}")
    if min(found.m) < 1 or min(found.threads) < 1:
        parser.error("--m and --threads take positive numbers")
    return found


def restrict(isa: str) -> None:
    """Run this command again with the limits of `isa` in the environment: libraries read them when they load."""
    limits = {"FOURBIT_CPU_ISA": isa, **ISA_LIMITS[isa]}
    if any(os.environ.get(name) != value for name, value in limits.items()):
        os.execve(sys.executable, [sys.executable, "-m", "peers", *sys.argv[1:]], {**os.environ, **limits})


def main() -> None:
    """Measure, print, and write the JSON file."""
    if sys.argv[1:2] and sys.argv[1] in ON_GPU:
        return importlib.import_module(f"peers.{sys.argv[1]}").main(sys.argv[2:])
    options = arguments()
    if options.isa:
        restrict(options.isa)
    import torch

    from harness import bnb, machine
    from peers import cpu, report

    cases = cpu.CASES if options.cases is None else {}
    for name in options.cases or ():
        if name not in cpu.CASES:
            raise SystemExit(f"there is no case {name!r}: {', '.join(cpu.CASES)}")
        cases[name] = cpu.CASES[name]
    if options.sweep:
        cases = {"sweep": cpu.sweep}
    settings = cpu.Settings(
        shapes=options.shapes,
        rows=options.m,
        threads=options.threads,
        dtypes=options.dtype,
        seconds=0.25 if options.quick else 1.0,
        rounds=(3, 15) if options.quick else (5, 61),
        side=4096 if options.quick else 8192,
        isa=options.isa,
        bnb=bnb.load(),
    )
    about = machine.about(options.isa)
    machine.print_about(about)
    torch.manual_seed(0)
    rows = []
    with torch.no_grad():
        for name, case in cases.items():
            heading = None
            for row in cpu.watched(case(settings)):
                rows.append(row)
                heading = report.print_row(name, row, heading)
    report.print_summary(rows)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as stream:
            json.dump({**about, "rows": [row.to_dict() for row in rows]}, stream, indent=1)


if __name__ == "__main__":
    main()
