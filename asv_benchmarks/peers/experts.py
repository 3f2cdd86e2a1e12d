"""grouped_linear_4bit and its gradient, from one token on, beside torch's grouped 16-bit product, on a GPU.

    python -m peers experts                          # 64 experts, and Qwen3-30B-A3B's 128
    python -m peers experts --experts 64x2048x1408 --tokens 1,64,512,4096 --grad
    python -m peers experts --check --grad           # errors beside float32, no times

Every token goes to 8 experts at random, so that there are 8 rows a token, sorted by expert. The loop is torch's 16-bit
product for each expert that has rows, the row counts known to the host beforehand. Timed as `peers.rows` times; the
calls of a replay differ in their routing, and one token's experts are other ones in each call, so that they are cold.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import fourbit
from harness import bnb
from harness.arguments import numbers, words
from harness.graphs import COLD_BYTES, Call
from harness.timing import copies_for
from harness.weights import BLOCKSIZE, DTYPES, stored_bytes
from peers import ratios, targets
from peers.cuda import setting
from peers.ratios import DOUBLE, FOURBIT, TORCH, Budget, Cell, Check

EXPERTS = "64x2048x1408,64x1408x2048,128x1536x2048,128x2048x768"
TOKENS = (1, 8, 64, 512, 2048, 4096, 8192)
TOP = 8
ROUNDS = 7
LOOP = "torch, loop"

Sizes = tuple[int, int, int]
"""Experts, out, in."""


def grouped_mm() -> Callable[..., Tensor]:
    """torch's: public since 2.10."""
    public = getattr(torch.nn.functional, "grouped_mm", None)
    return torch._grouped_mm if public is None else public


class ExpertWeights:
    """Random stacked weights, packed once and in 16 bit, in the copies that make each call's cold."""

    def __init__(self, sizes: Sizes, dtype: str, doubles: Sequence[bool], device: str, cold: int) -> None:
        self.sizes = sizes
        generator = torch.Generator(device).manual_seed(sum(sizes))
        plain = torch.randn(*sizes, dtype=DTYPES[dtype], device=device, generator=generator).mul_(0.02)
        self.plain = [plain.clone() for _ in range(copies_for(plain.nbytes, cold) - 1)] + [plain]
        self.packed: dict[bool, list[tuple[Tensor, fourbit.QuantState]]] = {}
        for double in doubles:
            packed, state = fourbit.quantize_4bit(plain, blocksize=BLOCKSIZE, double_quant=double)
            count = copies_for(stored_bytes(packed, state), cold)
            self.packed[double] = [(packed, state), *((packed.clone(), _copied(state)) for _ in range(count - 1))]


def _copied(state: fourbit.QuantState) -> fourbit.QuantState:
    """With scales of its own; the tables are shared, as in a model."""
    nested = None if state.nested_absmax is None else state.nested_absmax.clone()
    tables = (state.nested_code, state.nested_offset)
    fields = (state.shape, state.code, state.blocksize, state.quant_type, state.dtype)
    return fourbit.QuantState(state.absmax.clone(), *fields, nested, *tables)


def routings(experts: int, tokens: int, count: int, top: int = TOP) -> list[list[int]]:
    """For each of `count` calls the ends of the experts' rows: tokens that go to `top` different ones at random.

    The one token of a call goes to experts that the calls before it left out, while there are such.
    """
    generator = torch.Generator().manual_seed(experts + tokens)
    found = []
    order = torch.randperm(experts, generator=generator)
    for call in range(count):
        if tokens == 1:
            chosen = order.roll(-call * top)[:top]
        else:
            chosen = torch.rand(tokens, experts, generator=generator).topk(top, dim=1).indices.reshape(-1)
        found.append(torch.bincount(chosen, minlength=experts).cumsum(0).tolist())
    return found


def product(x: Tensor, offsets: Tensor, packed: Tensor, state: fourbit.QuantState, grad: bool) -> Tensor:
    """fourbit's: sorted rows [T, in] times each expert's transposed weight, or a gradient [T, out] times the weight."""
    if not grad:
        return fourbit.grouped_linear_4bit(x, offsets, packed, state)
    weight, nested = state.weight(packed).flat()
    return torch.ops.fourbit.grouped_linear_4bit_grad(x, offsets, *weight, state.shape[2], *nested)


def loop(x: Tensor, ends: Sequence[int], weight: Tensor, grad: bool) -> Tensor:
    """torch's product, expert by expert."""
    out = x.new_empty(x.shape[0], weight.shape[2 if grad else 1])
    for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end > begin:
            torch.mm(x[begin:end], weight[expert] if grad else weight[expert].t(), out=out[begin:end])
    return out


def calls(w: ExpertWeights, tokens: int, dtype: str, grad: bool) -> dict[str, list[Call]]:
    """Who multiplies the rows, a call for each routing, each on the next copy of its weight."""
    experts, out, inner = w.sizes
    device = w.plain[0].device
    count = 8 if tokens <= 64 else 2
    ends = routings(experts, tokens, count, min(TOP, experts))
    generator = torch.Generator(device).manual_seed(tokens)
    width = out if grad else inner
    x = torch.randn(ends[0][-1], width, dtype=DTYPES[dtype], device=device, generator=generator)
    offsets = [torch.tensor(each, dtype=torch.int32, device=device) for each in ends]
    run = grouped_mm()
    plain = [w.plain[i % len(w.plain)] for i in range(count)]
    oriented = plain if grad else [each.transpose(1, 2) for each in plain]
    found: dict[str, list[Call]] = {
        TORCH: [lambda d=d, o=o: run(x, d, offs=o) for d, o in zip(oriented, offsets, strict=True)],
        LOOP: [lambda d=d, e=e: loop(x, e, d, grad) for d, e in zip(plain, ends, strict=True)],
    }
    for double, copies in w.packed.items():
        own = [(o, *copies[i % len(copies)]) for i, o in enumerate(offsets)]
        found[FOURBIT + (DOUBLE if double else "")] = [lambda a=a: product(x, *a, grad) for a in own]
    return found


def check(w: ExpertWeights, tokens: int, dtype: str, grad: bool, double: bool) -> Check:
    """fourbit's product beside that of its dequantized weights in float32, and beside torch's loop in 16 bit."""
    packed, state = w.packed[double][0]
    experts, out, inner = w.sizes
    device = packed.device
    ends = routings(experts, tokens, 1, min(TOP, experts))[0]
    generator = torch.Generator(device).manual_seed(tokens)
    x = torch.randn(ends[-1], out if grad else inner, dtype=DTYPES[dtype], device=device, generator=generator)
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    found = product(x, offsets, packed, state, grad)
    again = product(x, offsets, packed, state, grad)
    true = loop(x.float(), ends, fourbit.dequantize_4bit(packed, state, torch.float32), grad)
    theirs = loop(x, ends, fourbit.dequantize_4bit(packed, state, DTYPES[dtype]), grad)
    what = f"{label(w.sizes, grad)}{DOUBLE if double else ''}, {tokens} tokens"
    error = ratios.relative_error(found, true)
    return Check(what, error, ratios.relative_error(theirs, true), torch.equal(found, again))


def label(sizes: Sizes, grad: bool) -> str:
    """Of a line of the table."""
    return "x".join(map(str, sizes)) + (" gradient" if grad else "")


def judged(found: Sequence[Cell]) -> list[str]:
    """What is below its target."""
    missed = []
    for cell in found:
        target = targets.experts(cell.column)
        if cell.who.startswith(FOURBIT) and target.verdict(cell.ratio) == "MISSED":
            missed.append(f"{cell.line}, {cell.column} tokens, {cell.who}: {cell.ratio:.2f} ({target.describe()})")
    return missed


def expert_sizes(text: str) -> tuple[Sizes, ...]:
    """Such as "64x2048x1408,128x1536x2048": experts x out x in."""
    return tuple((int(e), int(n), int(k)) for e, n, k in (part.split("x") for part in words(text)))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m peers experts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = expert_sizes(EXPERTS)
    parser.add_argument("--experts", type=expert_sizes, default=default, help=f"experts x out x in (default {EXPERTS})")
    parser.add_argument("--tokens", type=numbers, default=TOKENS, help="of 8 rows each, such as 1,64,4096")
    kind = "torch's grouped product: bf16 only"
    ratios.add_options(parser, ROUNDS, 120.0, grad="too", double="no", weights="weights", dtype=kind)
    options = parser.parse_args(argv)
    if options.dtype == "fp16" and not options.check:
        parser.error("torch's grouped product takes bfloat16 only: --dtype fp16 is for --check")
    return options


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the tables, or check; see the module's docstring."""
    options = arguments(argv)
    budget = Budget(options.seconds)
    if not torch.cuda.is_available():
        raise SystemExit("python -m peers experts: no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    about = setting(bnb.load())
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    found: list[Cell] = []
    checks: list[Check] = []
    if not options.check:
        print(f"Ratio to torch's grouped product:\n{ratios.heading('experts x out x in', options.tokens)}", flush=True)
    for sizes in options.experts:
        if not budget.allows(label(sizes, False)):
            continue
        cold = 0 if options.check else COLD_BYTES
        w = ExpertWeights(sizes, options.dtype, ratios.passes(options.double), "cuda", cold)
        here: list[Cell] = []
        for grad in ratios.passes(options.grad):
            for tokens in options.tokens:
                if options.check:
                    checks += [check(w, tokens, options.dtype, grad, double) for double in w.packed]
                else:
                    who = calls(w, tokens, options.dtype, grad)
                    here += ratios.contest(label(sizes, grad), tokens, who, options.rounds)
                torch.cuda.empty_cache()
        found += here
        print(ratios.body(here, options.tokens, ratios=True) or f"{label(sizes, False)} is checked", flush=True)
        del w
        if options.json:
            content = {"setting": about, "cells": [vars(c) for c in found], "checks": [vars(c) for c in checks]}
            options.json.write_text(json.dumps(content, indent=1))
    said = []
    for op in ("grouped_linear_4bit", "grouped_linear_4bit_grad"):
        how = fourbit.explain(op, device="cuda", dtype=DTYPES[options.dtype], blocksize=BLOCKSIZE, shape=sizes)
        said.append(f"{op}: {how.backend}: {how.path}")
    title = "experts x out x in"
    ratios.conclude(found, title, options.tokens, judged(found), "\n".join(said), checks, budget)


if __name__ == "__main__":
    main()
