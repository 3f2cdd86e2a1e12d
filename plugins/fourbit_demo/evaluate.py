"""One model folder in a process of its own: load it, let it write a sentence, measure its perplexity.

`python -m fourbit_demo.evaluate FOLDER` prints JSON lines (`workers`). A 4-bit folder is loaded by
`fourbit_transformers`, any other by transformers.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

from fourbit_demo import sample_text
from fourbit_demo.workers import Channel, Progress

NEW_TOKENS = 32


def evaluate(folder: Path, progress: Progress) -> dict[str, Any]:
    """Text, perplexity, seconds, and which backend ran each op. Activations are float32 on any CPU.

    The weights are those of the folder: 16-bit ones go to float32 without loss, 4-bit ones stay packed.
    """
    import torch

    from fourbit import dispatch
    from fourbit.checkpoint.reader import Checkpoint

    seconds: dict[str, float] = {}
    begin = time.perf_counter()
    with Checkpoint(folder) as checkpoint:
        is_4bit = bool(checkpoint.quantized())
    model = _load(folder, is_4bit).eval()
    tokenizer = _tokenizer(folder)
    seconds["load"] = time.perf_counter() - begin

    begin = time.perf_counter()
    text, digest = sample_text.read_text()
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    want = sample_text.WINDOWS * sample_text.WINDOW_TOKENS
    if len(tokens) < want:
        raise RuntimeError(f"the text has {len(tokens)} tokens, want {want}")
    windows = tokens[:want].view(sample_text.WINDOWS, sample_text.WINDOW_TOKENS)
    with torch.inference_mode():
        perplexity = _perplexity(model, windows, progress)
        seconds["perplexity"] = time.perf_counter() - begin
        begin = time.perf_counter()
        sentence = _sentence(model, tokenizer)
        seconds["generate"] = time.perf_counter() - begin
    return {
        "perplexity": perplexity,
        "text": sentence,
        "tokens": want,
        "text_sha256": digest,
        "seconds": seconds,
        "ops": [describe(found) for found in dispatch.resolutions()],
        "threads": torch.get_num_threads(),
    }


def _load(folder: Path, is_4bit: bool) -> Any:
    if is_4bit:
        from fourbit_transformers import load

        return load(folder, dtype="float32")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype="float32")


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _perplexity(model: Any, windows: Any, progress: Progress) -> float:
    """exp of the mean negative log-likelihood of tokens 2 … 512 of each window."""
    from torch.nn.functional import cross_entropy

    total = 0.0
    for done, window in enumerate(windows, 1):
        logits = model(window[None]).logits[0]
        total += float(cross_entropy(logits[:-1].float(), window[1:], reduction="sum"))
        progress(done, len(windows) + 1)
    return math.exp(total / (len(windows) * (windows.shape[1] - 1)))


def _sentence(model: Any, tokenizer: Any) -> str:
    """What the model answers to the prompt, greedily."""
    chat = [{"role": "user", "content": sample_text.PROMPT}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    answer: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()


def describe(found: Any) -> dict[str, Any]:
    """A resolution of an op as JSON values: what ran, and why nothing before it."""
    query = found.query
    return {
        "op": query.op,
        "backend": found.entry.name,
        "composed_of_other_ops": found.backend.composes(query.op),
        "device": str(query.device),
        "dtype": str(query.dtype).removeprefix("torch."),
        "blocksize": query.blocksize,
        "double_quant": query.nested,
        "rejected": dict(found.rejected),
    }


def _main() -> None:
    channel = Channel()
    channel.result(evaluate(Path(sys.argv[1]), channel.progress))


if __name__ == "__main__":
    _main()
