"""Runs vLLM on some folders, in a process of its own: `python -m tests.vllm.engine JOBS ANSWERS`, both JSON files.

A job is {"folder": …, "options": …} with LLM's arguments; with "adapter", a folder, its answers are the adapter's.
The answers of one: {"tokens": …, "layers": names of the 4-bit ones, by rank}, or {"error": …}.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(folder: Path, jobs: list[dict[str, Any]], ranks: int = 1, timeout: float = 900) -> list[dict[str, Any]]:
    """The answers to jobs on so many ranks."""
    questions, answers, log = folder / "jobs.json", folder / "answers.json", folder / "log.txt"
    questions.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.vllm.engine", str(questions), str(answers)]
    with open(log, "w") as stream:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(ranks), stdout=stream, stderr=subprocess.STDOUT, timeout=timeout
        )
    assert done.returncode == 0 and answers.exists(), log.read_text()[-6000:]
    return json.loads(answers.read_text())


def environment(ranks: int = 1) -> dict[str, str]:
    """For a process of vLLM on this machine's CPU, or on its GPUs where vLLM's build is for them."""
    cores = sorted(os.sched_getaffinity(0))
    chosen = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # of the function that `apply_model` takes
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(cores[i % len(cores)]) for i in range(ranks)),
    }
    if ranks == 1:
        chosen |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        del chosen["VLLM_CPU_OMP_THREADS_BIND"]
    return {**os.environ, **chosen}


def main(questions: str, answers: str) -> None:
    found = [_answered(job) for job in json.loads(Path(questions).read_text())]
    Path(answers).write_text(json.dumps(found))


def _answered(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from tests.vllm.engine import layers as named  # by its module's name, by which workers find it
    from tests.vllm.models import NEW_TOKENS, PROMPTS

    options = {
        **{"dtype": "float32", "max_model_len": 64, "max_num_seqs": 4, "skip_tokenizer_init": True},
        **{"enforce_eager": True, "disable_log_stats": True, "gpu_memory_utilization": 0.3},
        **job.get("options", {}),
    }
    if options.get("tensor_parallel_size", 1) == options.get("pipeline_parallel_size", 1) == 1:
        options["distributed_executor_backend"] = "uni"
    try:
        engine = LLM(job["folder"], **options)
        request = None
        if "adapter" in job:
            from vllm.lora.request import LoRARequest

            request = LoRARequest("adapter", 1, job["adapter"])
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, detokenize=False, ignore_eos=True)
        prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
        outputs = engine.generate(prompts, sampling, lora_request=request, use_tqdm=False)
        found = {"tokens": [list(each.outputs[0].token_ids) for each in outputs], "layers": engine.apply_model(named)}
        del engine
    except Exception as error:
        traceback.print_exc()
        found = {"tokens": None, "error": str(error), "layers": [{}] * 2}
    cleanup_dist_env_and_memory()
    torch._dynamo.reset()
    gc.collect()
    return found


def layers(model: Any) -> dict[str, str]:
    """The 4-bit layers of vLLM's model by name, each with how it is stored, for whom `apply_model` runs it."""
    found = {}
    for name, module in model.named_modules():
        names = [each for each, _ in module.named_parameters(recurse=False)]
        if any("qweight" in each for each in names):
            found[name] = " ".join(sorted(names))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
