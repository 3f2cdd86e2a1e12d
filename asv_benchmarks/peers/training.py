"""A QLoRA step on layers of Llama 3 8B's shape, beside bitsandbytes and LoRA on bfloat16, on a GPU: time and memory.

    python -m peers training                                    # 8 layers; 1×2048 and 4×2048 tokens; about a minute
    python -m peers training --batch 1 --checkpointing no --rounds 20
    python -m peers training --device cpu --tiny                # a look at any machine

LoRA (r 16) by peft on all linear layers but the head, its own choice of the adapters' dtype (float32), AdamW. The
models take turns; bfloat16 has the first and the last turn of each round. Of a step: milliseconds until it is done
(wall) and until the host has queued it (host), medians; the time in which a kernel ran, by torch's profiler (device);
and the peak of memory, of torch's count, as if the model were alone: its own tensors, and what a step allocates.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from harness import bnb, machine
from harness.arguments import numbers
from harness.device_time import busy_milliseconds
from peers import models, targets
from peers.cuda import setting
from peers.models import BF16

AGAIN = "bf16, again"
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16
WARM_UP = 2
TINY = {
    **{"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 32},
}


@dataclass
class Trainee:
    """A model with adapters and their optimizer, and what was measured of its steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    own: int
    """Bytes of the model."""
    wall: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    peak: int = 0
    device: float | None = None
    losses: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> Trainee:
        """With adapters that are alike for all: of one seed."""
        import peft

        torch.manual_seed(0)
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LAYERS))
        adapted = peft.get_peft_model(model, config).train()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        return cls(adapted, torch.optim.AdamW(trained, lr=1e-4), models.nbytes(adapted))

    def checkpointing(self, on: bool) -> None:
        """Turn gradient checkpointing on or off."""
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def step(self, ids: torch.Tensor, autocast: bool) -> torch.Tensor:
        """Forward, backward, AdamW; the loss, not waited for."""
        how = torch.autocast(ids.device.type, torch.bfloat16) if autocast else nullcontext()
        with how:
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def measure(self, ids: torch.Tensor, autocast: bool, counted: bool) -> None:
        """One step with its times and its peak."""
        cuda = ids.device.type == "cuda"
        before = 0
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        loss = self.step(ids, autocast)
        queued = time.perf_counter()
        if cuda:
            torch.cuda.synchronize()
        end = time.perf_counter()
        self.losses.append(float(loss))
        if counted:
            self.wall.append((end - start) * 1e3)
            self.host.append((queued - start) * 1e3)
            if cuda:
                state = sum(t.nbytes for s in self.optimizer.state.values() for t in s.values() if t.is_cuda)
                self.peak = max(self.peak, torch.cuda.max_memory_allocated() - before + self.own + state)

    def profile(self, ids: torch.Tensor, autocast: bool) -> None:
        """Milliseconds of kernels and copies in a step."""
        self.device = busy_milliseconds(lambda: self.step(ids, autocast)) or None

    def reset(self) -> None:
        """Forget what was measured."""
        self.wall, self.host, self.losses, self.peak, self.device = [], [], [], 0, None


@dataclass(frozen=True)
class Row:
    """What is printed of one model in one case; milliseconds and bytes, `of_bf16` the wall over bfloat16's."""

    case: str
    who: str
    wall: float
    host: float
    device: float | None
    peak: int
    of_bf16: float
    losses: tuple[float, float]


def rows(case: str, trainees: dict[str, Trainee], again: Sequence[float]) -> list[Row]:
    """Of all models; bfloat16's wall is the mean of its two medians."""
    median = {who: statistics.median(each.wall) for who, each in trainees.items()}
    base = (median[BF16] + statistics.median(again)) / 2
    return [
        Row(
            case,
            who,
            median[who],
            statistics.median(each.host),
            each.device,
            each.peak,
            median[who] / base,
            (each.losses[0], each.losses[-1]),
        )
        for who, each in trainees.items()
    ]


def table(found: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| tokens | | wall ms | host ms | device ms | peak GB | wall / bf16 | loss, first to last | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        device = "–" if row.device is None else f"{row.device:.1f}"
        verdict = ""
        if row.who == models.FOURBIT:
            verdict = f"{targets.TRAINING.describe()}: {targets.TRAINING.verdict(row.of_bf16)}"
        lines.append(
            f"| {row.case} | {row.who} | {row.wall:.1f} | {row.host:.1f} | {device} | {row.peak / 1e9:.2f} |"
            f" {row.of_bf16:.2f} | {row.losses[0]:.3f} to {row.losses[1]:.3f} | {verdict} |"
        )
    return "\n".join(lines)


def compare(
    trainees: dict[str, Trainee], ids: torch.Tensor, checkpointing: bool, rounds: int, autocast: bool
) -> list[Row]:
    """One case, the models in turn."""
    for each in trainees.values():
        each.reset()
        each.checkpointing(checkpointing)
    again: list[float] = []
    for done in range(WARM_UP + rounds):
        for each in trainees.values():
            each.measure(ids, autocast, counted=done >= WARM_UP)
        base = trainees[BF16]
        if done >= WARM_UP:
            base.measure(ids, autocast, counted=True)
            again.append(base.wall.pop())
            base.host.pop()
    if ids.is_cuda:
        for each in trainees.values():
            each.profile(ids, autocast)
    case = f"{ids.shape[0]}×{ids.shape[1]}" + (", checkpointing" if checkpointing else "")
    return rows(case, trainees, again)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m peers training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=numbers, default=(1, 4), help="sequences of a step (1,4)")
    parser.add_argument("--tokens", type=int, default=2048, help="of a sequence")
    parser.add_argument("--checkpointing", choices=("no", "yes", "both"), default="both", help="of gradients")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--double", action="store_true", help="double-quantized weights")
    parser.add_argument("--autocast", action="store_true", help="the forward as transformers' Trainer runs it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args(argv)
    if options.tiny:
        options.layers, options.tokens = min(options.layers, 2), min(options.tokens, 64)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    options = arguments(argv)
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise SystemExit("python -m peers training: no CUDA device")
    library = bnb.load()
    about = {**(setting(library) if cuda else machine.about()["versions"]), **models.versions()}
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    config = models.llama(options.layers, **(TINY if options.tiny else {}))
    made = models.contenders(config, options.device, library, options.double)
    trainees = {who: Trainee.of(model) for who, model in made.items()}
    del made
    generator = torch.Generator().manual_seed(1)
    found: list[Row] = []
    for batch in options.batch:
        ids = torch.randint(0, config.vocab_size, (batch, options.tokens), generator=generator).to(options.device)
        for checkpointing in {"no": (False,), "yes": (True,), "both": (False, True)}[options.checkpointing]:
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
            done = compare(trainees, ids, checkpointing, options.rounds, options.autocast)
            found += done
            print("\n".join(table(done).splitlines()[0 if done == found else 2 :]), flush=True)
            if options.json:
                options.json.write_text(json.dumps({"setting": about, "rows": [vars(r) for r in found]}, indent=1))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the libraries' own
    main()
