"""Whole models beside bfloat16 and bitsandbytes on a GPU: decoding, prefill, experts, transformers' generate.

    python -m peers model                                # everything, about five minutes, most of it compiling
    python -m peers model --parts decode,prefill,moe     # no compiling, about a minute
    python -m peers model --parts generate --batch 1
    python -m peers model --device cpu --tiny            # a look at any machine

Models of Llama 3 8B's and Qwen3-30B-A3B's shapes with random weights; the head stays in 16 bit, as it does everywhere.
decode: one token for each sequence after --context others, replayed as one CUDA graph. prefill: 2048 tokens of one
sequence, as a call. moe: both, of 8 layers of experts. generate: transformers' with a static cache, which compiles the
step; the time from token to token, by the host's clock. All models are there at once and take turns; bfloat16 has the
first and the last turn of each round.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import bnb, machine
from harness.arguments import numbers, words
from harness.device_time import busy_milliseconds
from peers import decode, models, ratios, targets
from peers.cuda import setting
from peers.decode_step import DecodeStep
from peers.models import BF16

AGAIN = "bf16, again"
PARTS = ("decode", "prefill", "moe", "generate")
TINY = {
    "llama": {
        **{"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 32},
    },
    "moe": {
        **{"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 32, "num_experts": 16, "num_experts_per_tok": 4},
        **{"moe_intermediate_size": 64},
    },
}


@dataclass(frozen=True)
class Row:
    """One line of the table: milliseconds of each model, and how it was timed if not as the docstring says."""

    what: str
    batch: int
    milliseconds: dict[str, float]
    target: targets.Target | None = None
    note: str = ""

    def over_bf16(self, who: str) -> float:
        """Its time over bfloat16's, which is the mean of its two."""
        times = self.milliseconds
        return times[who] / ((times[BF16] + times[AGAIN]) / 2)


def in_turn(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Medians of what each returns, bfloat16's first and last in each round."""
    samples: dict[str, list[float]] = {who: [] for who in (*runs, AGAIN)}
    for _ in range(rounds):
        for who, run in (*runs.items(), (AGAIN, runs[BF16])):
            samples[who].append(run())
    return {who: statistics.median(taken) for who, taken in samples.items()}


def decoding(name: str, found: dict[str, nn.Module], batch: int, options: argparse.Namespace) -> Row:
    """The line of a decoding step."""
    steps = {who: DecodeStep(model, batch, options.context, options.device) for who, model in found.items()}
    if options.device == "cuda":
        for step in steps.values():
            step.capture()
    times = in_turn({who: step.run for who, step in steps.items()}, options.rounds)
    notes = ", ".join(f"{who} {step.note}" for who, step in steps.items() if step.note)
    # the experts of a mixture have no target of their own
    target = targets.DECODE_GPU.get(batch) if name == "Llama" else None
    return Row(f"{name}, decode", batch, times, target, notes)


def prefill(name: str, found: dict[str, nn.Module], options: argparse.Namespace) -> tuple[Row, dict[str, float]]:
    """The line of a prefill, and how far the 4-bit models' last logits are from bfloat16's."""
    vocabulary = found[BF16].config.vocab_size
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (1, options.prefill), generator=generator).to(options.device)

    def call(model: nn.Module) -> Tensor:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits

    logits = {who: call(model).float() for who, model in found.items()}  # not counted
    errors = {who: ratios.relative_error(own, logits[BF16]) for who, own in logits.items() if who != BF16}

    def run(model: nn.Module) -> float:
        _synchronize(options.device)
        start = time.perf_counter()
        call(model)
        _synchronize(options.device)
        return (time.perf_counter() - start) * 1e3

    times = in_turn({who: lambda m=model: run(m) for who, model in found.items()}, max(3, options.rounds // 2))
    target = targets.PREFILL if name == "Llama" else None
    return Row(f"{name}, prefill of {options.prefill}", 1, times, target), errors


def generating(found: dict[str, nn.Module], batch: int, options: argparse.Namespace) -> Row:
    """The line of transformers' generate, whose steps are compiled where there is a GPU."""
    torch._dynamo.reset()  # what was compiled for another batch, which would be made general for both
    for model in found.values():
        model.__dict__.pop("_compiled_call", None)
        model.__dict__.pop("_cache", None)
    vocabulary = found[BF16].config.vocab_size
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, vocabulary, (batch, options.prompt), generator=generator).to(options.device)

    def run(model: nn.Module) -> float:
        _, taken = decode.generate(model, prompt, options.new, cache_implementation="static")
        return statistics.median(taken) * 1e3

    runs: dict[str, Callable[[], float]] = {}
    notes = []
    for who, model in found.items():
        start = time.perf_counter()
        try:
            run(model)
            run(model)
        except Exception as error:  # whatever keeps one from being compiled, the others are measured
            notes.append(f"{who}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
            continue
        runs[who] = lambda m=model: run(m)
        print(f"  generate, batch {batch}, {who}: compiled in {time.perf_counter() - start:.0f} s", flush=True)
    if BF16 not in runs:
        raise RuntimeError(f"there is nothing to compare with: {notes}")
    name = f"Llama, {options.generate_layers} layers, generate"
    times = in_turn(runs, 3)
    if options.device == "cuda":  # beside the host's clock; the prefill's share is small
        busy = {who: busy_milliseconds(lambda who=who: runs[who]()) / options.new for who in runs}
        notes.append("device ms a token, prefill included: " + ", ".join(f"{w} {ms:.2f}" for w, ms in busy.items()))
    return Row(name, batch, times, targets.GENERATE, "; ".join(notes))


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def heading(who: Sequence[str]) -> str:
    """Markdown: the first two lines of the table."""
    names = [f"{each} ms" for each in who] + [f"{each} / bf16" for each in who if each != BF16]
    return "| | batch | " + " | ".join(names) + " | | |\n" + "|---" * (len(names) + 4) + "|"


def line(row: Row, who: Sequence[str]) -> str:
    """Markdown: a row."""
    cells = [f"{row.milliseconds[each]:.2f}" if each in row.milliseconds else "–" for each in who]
    cells += [f"{row.over_bf16(each):.2f}" if each in row.milliseconds else "–" for each in who if each != BF16]
    verdict = ""
    if row.target is not None and models.FOURBIT in row.milliseconds:
        verdict = f"{row.target.describe()}: {row.target.verdict(row.over_bf16(models.FOURBIT))}"
    return f"| {row.what} | {row.batch} | " + " | ".join(cells) + f" | {verdict} | {row.note} |"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m peers model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=words, default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument("--batch", type=numbers, default=(1, 8, 16), help="of decode; generate takes those up to 8")
    parser.add_argument("--layers", type=int, default=32, help="of the Llama for decode and prefill")
    parser.add_argument("--moe-layers", type=int, default=8)
    parser.add_argument("--generate-layers", type=int, default=12)
    parser.add_argument("--context", type=int, default=256, help="tokens before the one that is decoded")
    parser.add_argument("--prefill", type=int, default=2048, metavar="TOKENS")
    parser.add_argument("--prompt", type=int, default=64, metavar="TOKENS", help="before generate's")
    parser.add_argument("--new", type=int, default=64, metavar="TOKENS", help="of generate")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--double", action="store_true", help="double-quantized weights")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args(argv)
    if not set(options.parts) <= set(PARTS):
        parser.error(f"--parts takes {','.join(PARTS)}")
    if options.tiny:
        options.layers = options.moe_layers = options.generate_layers = 2
        options.prefill, options.prompt, options.new = 64, 8, 8
    return options


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table line by line."""
    options = arguments(argv)
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise SystemExit("python -m peers model: no CUDA device")
    warnings.simplefilter("ignore")  # the libraries' own
    library = bnb.load()
    about = {**(setting(library) if cuda else machine.about()["versions"]), **models.versions()}
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    who = (BF16, models.FOURBIT, *((models.BNB,) if library is not None else ()))
    found: list[Row] = []
    said: list[str] = []
    print(heading(who), flush=True)

    def add(row: Row) -> None:
        found.append(row)
        print(line(row, who), flush=True)
        if options.json:
            options.json.write_text(json.dumps({"setting": about, "rows": [_json(r) for r in found]}, indent=1))

    tiny = TINY if options.tiny else {"llama": {}, "moe": {}}
    llama, moe = {"decode", "prefill"} & set(options.parts), {"moe"} & set(options.parts)
    kinds = [("Llama", models.llama(options.layers, **tiny["llama"]), llama)] if llama else []
    kinds += [("Qwen3-MoE", models.qwen3_moe(options.moe_layers, **tiny["moe"]), {"decode", "prefill"})] if moe else []
    for name, config, parts in kinds:
        made = models.contenders(config, options.device, library, options.double)
        sizes = ", ".join(f"{each} {models.nbytes(model) / 1e9:.2f} GB" for each, model in made.items())
        said.append(f"{name}, {config.num_hidden_layers} layers: {sizes}")
        for batch in options.batch if "decode" in parts else ():
            add(decoding(name, made, batch, options))
            _free(cuda)
        if "prefill" in parts:
            row, errors = prefill(name, made, options)
            add(row)
            said += [f"{name}, logits of {each} differ from bfloat16's by {e:.4f}" for each, e in errors.items()]
        del made
        _free(cuda)
    if "generate" in options.parts:
        config = models.llama(options.generate_layers, **tiny["llama"])
        made = models.contenders(config, options.device, library, options.double)
        for batch in (batch for batch in options.batch if batch <= 8):
            add(generating(made, batch, options))
    print("\n".join(said))


def _json(row: Row) -> dict[str, Any]:
    return {"what": row.what, "batch": row.batch, "milliseconds": row.milliseconds, "note": row.note}


def _free(cuda: bool) -> None:
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
