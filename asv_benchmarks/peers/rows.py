"""linear_4bit and its gradient for many numbers of rows, beside torch's 16-bit product and bitsandbytes, on a GPU.

    python -m peers rows                                           # nine shapes, 13 numbers of rows, under 150 s
    python -m peers rows --shapes 8192x8192 --rows 64,128,256,512,1024,4096
    python -m peers rows --grad only --double no                   # the gradient for x
    python -m peers rows --check --grad                            # errors beside float32, no times

Ratios are torch's time over the contender's, above 1 is faster. Times are medians of replays of a CUDA graph; weights
are cold, contenders take turns, torch has the first and the last turn of each round, and all have the same number
of calls in a replay. A gradient's peer from bitsandbytes is what its backward does: dequantize, then torch's matmul.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fourbit
from harness import bnb
from harness.arguments import numbers, shapes
from harness.graphs import Call
from harness.weights import DTYPES
from peers import ratios, targets
from peers.cuda import CudaWeights, setting
from peers.ratios import BNB, DOUBLE, FOURBIT, TORCH, Budget, Cell, Check

SHAPES = "8192x8192,14336x4096,4096x14336,28672x8192,1024x4096,4304x1152,6144x6144,128256x4096,13824x5120"
ROWS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
ROUNDS = 7


def product(x: Tensor, packed: Tensor, state: fourbit.QuantState, grad: bool) -> Tensor:
    """fourbit's: x [m, in] times the transposed weight [out, in], or a gradient [m, out] times the weight."""
    if not grad:
        return fourbit.linear_4bit(x, packed, state)
    weight, nested = state.weight(packed).flat()
    return torch.ops.fourbit.linear_4bit_grad(x, *weight, state.shape[1], *nested)


def calls(w: CudaWeights, x: Tensor, dtype: str, grad: bool, doubles: Sequence[bool]) -> dict[str, list[Call]]:
    """Who multiplies x, each on every copy of its weight."""
    if grad:
        found = {TORCH: [lambda d=d: torch.matmul(x, d) for d in w.torch(dtype)]}
    else:
        found = {TORCH: [lambda d=d: torch.nn.functional.linear(x, d) for d in w.torch(dtype)]}
    for double in doubles:
        name = DOUBLE if double else ""
        found[FOURBIT + name] = [lambda p=p, s=s: product(x, p, s, grad) for p, s in w.fourbit(double)]
        if w.bnb is not None:
            theirs = w.bitsandbytes(double, dtype)
            found[BNB + name] = [lambda p=p, s=s: _theirs(w.bnb, x, p, s, grad) for p, s in theirs]
    return found


def _theirs(library: Any, x: Tensor, packed: Tensor, state: Any, grad: bool) -> Tensor:
    if grad:
        return torch.matmul(x, library.functional.dequantize_4bit(packed, state))
    return library.matmul_4bit(x, packed.t(), quant_state=state)


def input_for(shape: tuple[int, int], m: int, dtype: str, grad: bool, device: str) -> Tensor:
    """Random rows of x, or of a gradient."""
    generator = torch.Generator(device).manual_seed(m)
    return torch.randn(m, shape[0 if grad else 1], dtype=DTYPES[dtype], device=device, generator=generator)


def check(w: CudaWeights, x: Tensor, dtype: str, grad: bool, double: bool) -> Check:
    """fourbit's product beside that of its dequantized weight in float32, and beside torch's in 16 bit."""
    packed, state = w.fourbit(double)[0]
    found = product(x, packed, state, grad)
    again = product(x, packed, state, grad)
    what = f"{label(w.shape, grad)}{DOUBLE if double else ''}, {x.shape[0]} rows"
    exact = fourbit.dequantize_4bit(packed, state, torch.float32)
    sixteen = fourbit.dequantize_4bit(packed, state, DTYPES[dtype])
    if not grad:
        exact, sixteen = exact.t(), sixteen.t()
    true = x.float() @ exact
    theirs = ratios.relative_error(x @ sixteen, true)
    return Check(what, ratios.relative_error(found, true), theirs, torch.equal(found, again))


def label(shape: tuple[int, int], grad: bool) -> str:
    """Of a line of the table."""
    return f"{shape[0]}x{shape[1]}" + (" gradient" if grad else "")


def judged(found: Sequence[Cell], shape: tuple[int, int], grad: bool) -> list[str]:
    """What is below its target, plain and double-quantized."""
    by_place = {(cell.column, cell.who): cell for cell in found}
    missed = []
    for cell in found:
        if not cell.who.startswith(FOURBIT):
            continue
        target = targets.many_rows(shape, cell.column, grad)
        where = f"{cell.line}, {cell.column} rows, {cell.who}: {cell.ratio:.2f}"
        if target is not None and target.verdict(cell.ratio) == "MISSED":
            missed.append(f"{where} ({target.describe()})")
        theirs = by_place.get((cell.column, cell.who.replace(FOURBIT, BNB)))
        if theirs is not None and cell.column >= 2048 and theirs.ratio > cell.ratio:
            missed.append(f"{where}, bitsandbytes {theirs.ratio:.2f}")
    return missed


def paths(
    shape: tuple[int, int], dtype: str, grad: bool, doubles: Sequence[bool], device: str
) -> list[tuple[str, str]]:
    """Of what, and what `fourbit.explain` says of the product."""
    op = "linear_4bit_grad" if grad else "linear_4bit"
    found = []
    for double in doubles:
        said = fourbit.explain(op, device=device, dtype=DTYPES[dtype], double_quant=double, blocksize=64, shape=shape)
        found.append((f"{label(shape, grad)}{DOUBLE if double else ''}", f"{said.backend}: {said.path}"))
    return found


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m peers rows", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=shapes, default=shapes(SHAPES), help=f"out x in (default {SHAPES})")
    parser.add_argument("--rows", type=numbers, default=ROWS, help="of x, such as 64,128,256")
    kind = "of x and of torch's weight"
    ratios.add_options(parser, ROUNDS, 130.0, grad="no", double="too", weights="shapes", dtype=kind)
    return parser.parse_args(argv)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the tables, or check; see the module's docstring."""
    options = arguments(argv)
    budget = Budget(options.seconds)
    if not torch.cuda.is_available():
        raise SystemExit("python -m peers rows: no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    library = None if options.check else bnb.load()
    about = setting(library)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    doubles = ratios.passes(options.double)
    found: list[Cell] = []
    checks: list[Check] = []
    missed: list[str] = []
    said: list[tuple[str, str]] = []
    if not options.check:
        print(f"Ratio to torch {options.dtype}:\n{ratios.heading('out x in', options.rows)}", flush=True)
    for shape in options.shapes:
        if not budget.allows(label(shape, False)):
            continue
        w = CudaWeights(shape, library, seed=sum(shape), device="cuda")
        if options.check:
            w.cold_bytes = 0  # one copy
        here: list[Cell] = []
        for grad in ratios.passes(options.grad):
            own: list[Cell] = []
            for m in options.rows:
                x = input_for(shape, m, options.dtype, grad, "cuda")
                if options.check:
                    checks += [check(w, x, options.dtype, grad, double) for double in doubles]
                else:
                    who = calls(w, x, options.dtype, grad, doubles)
                    own += ratios.contest(label(shape, grad), m, who, options.rounds)
                torch.cuda.empty_cache()  # what the graphs before held, and side streams
            missed += judged(own, shape, grad)
            said += paths(shape, options.dtype, grad, doubles, "cuda")
            here += own
        found += here
        print(ratios.body(here, options.rows, ratios=True) or f"{label(shape, False)} is checked", flush=True)
        del w
        torch.cuda.empty_cache()
        if options.json:
            content = {"setting": about, "dtype": options.dtype, "cells": [vars(c) for c in found]}
            content["checks"] = [vars(c) for c in checks]
            options.json.write_text(json.dumps(content, indent=1))
    ratios.conclude(found, "out x in", options.rows, missed, ratios.grouped(said), checks, budget)


if __name__ == "__main__":
    main()
