"""Tokens per second through transformers' generate, 4-bit against bfloat16, in one process and in turn.

    python -m peers.decode                     # SmolLM2 and a 1B-shaped Llama, batch 1 and 4
    python -m peers.decode --models 1b --batch 1 --threads 2

SmolLM2-135M-Instruct has its real weights (those of `fourbit demo`). The 1B shape is that of Llama 3.2 1B, with
random weights. The bfloat16 embedding and output head stay as they are, as `fourbit quantize` leaves them, unless
`--head` quantizes the head too. Greedy; the prompt's own pass is not counted. Needs about 6 GB of memory.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched by name
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, StoppingCriteria
from transformers.utils import logging

import fourbit
from harness import machine
from harness.timing import Times
from peers import targets

PROMPT_TOKENS = 16


class Clock(StoppingCriteria):
    """Stops nothing; notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def smollm2() -> Any:
    """The demo's model in bfloat16."""
    from fourbit_demo import sample_model

    gguf, _ = sample_model.find_weights()
    with tempfile.TemporaryDirectory() as folder:
        sample_model.convert(gguf, Path(folder))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=False).eval()


def llama_1b() -> Any:
    """A Llama of the shape of Llama 3.2 1B, in bfloat16, with random weights."""
    config = LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=8192,
        vocab_size=128256,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    rotary = type(model.model.rotary_emb)(config=config)  # its frequencies are computed, not loaded
    model.to_empty(device="cpu")
    model.model.rotary_emb = rotary
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(1 << 22, generator=generator) * 0.02).bfloat16()
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        if "norm" in name:
            flat.fill_(1)
            continue
        shift = int(torch.randint(noise.numel(), (1,), generator=generator))
        for start in range(0, flat.numel(), noise.numel()):
            part = flat[start : start + noise.numel()]
            part.copy_(noise.roll(shift)[: part.numel()])
    return model.eval()


MODELS = {"smollm2": ("SmolLM2-135M-Instruct", smollm2), "1b": ("1B-shaped random Llama", llama_1b)}


def generate(model: Any, prompt: torch.Tensor, tokens: int, **options: Any) -> tuple[torch.Tensor, list[float]]:
    """The new tokens [batch, tokens], and the seconds that each after the first took."""
    clock = Clock()
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=[clock],
        **options,
    )
    new = found[:, prompt.shape[1] :]
    if new.shape[1] != tokens or len(clock.times) != tokens:
        raise RuntimeError(f"generate gave {new.shape[1]} tokens in {len(clock.times)} steps, not {tokens}")
    return new, [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]


def compare(models: dict[str, Any], batch: int, tokens: int, rounds: int) -> tuple[dict[str, Times], float]:
    """Seconds a step of each model, taken in turn, and the share of equal tokens until they first differ."""
    vocabulary = min(model.config.vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(1, vocabulary, (batch, PROMPT_TOKENS), generator=generator)
    texts = {name: generate(model, prompt, 2)[0] for name, model in models.items()}  # not counted
    steps: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            texts[name], taken = generate(model, prompt, tokens)
            steps[name] += taken
    first, second = texts.values()
    same = float((first == second).long().cumprod(1).float().mean())
    return {name: Times.of(taken) for name, taken in steps.items()}, same


def pair(build: Any, head: bool, double_quant: bool) -> dict[str, Any]:
    """The bfloat16 model and its 4-bit copy."""
    plain = build()
    config = fourbit.QuantConfig(blocksize=64, double_quant=double_quant)
    small = fourbit.quantize_model(copy.deepcopy(plain), config)
    if head:
        small.lm_head = fourbit.nn.Linear4bit.from_linear(small.lm_head, config)
    return {"bf16": plain, "4-bit": small}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Tokens per second, 4-bit against bfloat16.")
    parser.add_argument("--models", default="smollm2,1b", help="of smollm2, 1b")
    parser.add_argument("--batch", default="1,4")
    parser.add_argument("--threads", default=str(torch.get_num_threads()), help="such as 1,2")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--head", action="store_true", help="quantize the output head too")
    parser.add_argument("--double-quant", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    logging.disable_progress_bar()
    about = machine.about()
    machine.print_about(about)
    rows = []
    with torch.inference_mode():
        for key in options.models.split(","):
            title, build = MODELS[key]
            models = pair(build, options.head, options.double_quant)
            for threads in map(int, options.threads.split(",")):
                torch.set_num_threads(threads)
                for batch in map(int, options.batch.split(",")):
                    times, same = compare(models, batch, options.tokens, options.rounds)
                    rates = {name: batch / t.median for name, t in times.items()}
                    ratio = rates["4-bit"] / rates["bf16"]
                    line = ", ".join(
                        f"{name} {rate:.2f} tokens/s [{batch / times[name].p90:.2f} to {batch / times[name].p10:.2f}]"
                        for name, rate in rates.items()
                    )
                    verdict = ""
                    if key == "1b" and batch == 1:
                        verdict = f" ({targets.DECODE.describe()}) {targets.DECODE.verdict(ratio)}"
                    where = f"batch {batch}, {threads} thread{'s' * (threads > 1)}"
                    print(f"{title}, {where}: {line}, ratio {ratio:.2f}{verdict}; same tokens {same:.0%}", flush=True)
                    rows.append({"model": title, "batch": batch, "threads": threads, "rates": rates, "ratio": ratio})
            del models
    if options.json:
        Path(options.json).write_text(json.dumps({**about, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
