"""Prints tokens a second of vLLM with fourbit's plugin beside bfloat16, on shapes with random weights.

    python -m peers.serving --gpus 1,2,4            # an 8B-shaped Llama; needs vLLM's CUDA build
    python -m peers.serving --shape moe --gpus 2    # Qwen3-30B-A3B's shape
    python -m peers.serving --shape tiny --gpus 1   # on a CPU, to try the script

Each engine is in a process of its own, with `--load-format dummy`, CUDA graphs and torch.compile as vLLM has them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

LLAMA = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "rms_norm_eps": 1e-5},
    **{"hidden_act": "silu", "max_position_embeddings": 8192, "tie_word_embeddings": False},
}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        **LLAMA,
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
        **{"num_attention_heads": 32, "num_key_value_heads": 8},
    },
    "moe": {
        **LLAMA,
        **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "norm_topk_prob": True},
        **{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "vocab_size": 151936},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
        **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1},
    },
    "tiny": {
        **LLAMA,
        **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 256},
        **{"num_attention_heads": 4, "num_key_value_heads": 2},
    },
}
BATCHES = (1, 4, 16, 64)
NEW_TOKENS = 128
PROMPT = 2048


def measured(folder: str, quantization: str | None, gpus: int, prompt: int, new: int) -> dict[str, float]:
    """Tokens a second of decoding by batch, and of a prefill of one prompt."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder,
        quantization=quantization,
        tensor_parallel_size=gpus,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=prompt + new,
        enable_prefix_caching=False,
    )

    def took(batch: int, length: int, tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": [(7 * i + j) % 200 for j in range(length)]} for i in range(batch)]
        start = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    found = {}
    for batch in BATCHES:
        took(batch, 16, 8)
        # the difference leaves the prompt out
        decode = median(took(batch, 16, new) - took(batch, 16, 1) for _ in range(3))
        found[f"decode {batch}"] = batch * (new - 1) / decode
    took(1, prompt, 1)
    found["prefill"] = prompt / median(took(1, prompt, 1) for _ in range(5))
    return found


def main() -> None:
    """One table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="8b", choices=list(SHAPES))
    parser.add_argument("--gpus", default="1")
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "METHOD", "GPUS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    prompt, new = (PROMPT, NEW_TOKENS) if arguments.shape != "tiny" else (64, 16)
    if arguments.one:
        folder, method, gpus = arguments.one
        found = measured(folder, method if method != "bf16" else None, int(gpus), prompt, new)
        (Path(folder) / "found.json").write_text(json.dumps(found))
        return
    columns = [*(f"decode {batch}" for batch in BATCHES), "prefill"]
    print(f"| {arguments.shape}, tokens a second | GPUs | " + " | ".join(columns) + " |")
    print("|---|---|" + "---|" * len(columns))
    for gpus in arguments.gpus.split(","):
        for method in ("bf16", "fourbit"):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(json.dumps(SHAPES[arguments.shape]))
                command = [sys.executable, "-m", "peers.serving", "--shape", arguments.shape]
                command += ["--one", folder, method, gpus]
                log = Path(folder) / "log.txt"
                with open(log, "w") as stream:
                    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
                    done = subprocess.run(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
                if done.returncode:
                    print(f"{method} on {gpus}: exit status {done.returncode}\n{log.read_text()[-3000:]}")
                    continue
                found = json.loads((Path(folder) / "found.json").read_text())
            cells = " | ".join(f"{found[column]:,.0f}" for column in columns)
            print(f"| {method} | {gpus} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
