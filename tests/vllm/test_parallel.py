"""vLLM on two ranks: each has its part of every weight, in 4 bits, and the tokens are those of one."""

from __future__ import annotations

import pytest
import torch

from tests.support import need

need("transformers")

from tests.vllm import engine, models  # noqa: E402

FOLDERS = {
    "nf4": lambda path: models.written(models.llama(), path),
    "double": lambda path: models.written(models.llama(), path, double_quant=True),
    "half blocks": lambda path: models.written(models.llama(**models.DIVIDED), path, double_quant=True),
    "torn blocks": lambda path: models.written(models.llama(**models.ODD), path),
    "one head of k and v": lambda path: models.written(models.llama(num_key_value_heads=1), path),
    "v in 16 bit": lambda path: models.written(models.llama(), path, skip_modules=("v_proj",)),
    "fused in the folder": lambda path: models.written(models.phi3(), path, double_quant=True),
    "qwen3-moe": lambda path: models.written(models.qwen3_moe(), path, double_quant=True),
    "mixtral": lambda path: models.written(models.mixtral(), path),
}
OPTIONS = {"by experts": {"enable_expert_parallel": True}, "while loading": {"quantization": "fourbit"}}
"""Of vLLM, for qwen3-moe."""
QUICK = {"half blocks", "qwen3-moe", "mixtral"}
"""Those that continuous integration has the time for."""


def some(*names):
    """Parameters of a test, `name`."""
    return models.some(names, QUICK)


@pytest.fixture(scope="module")
def served(tmp_path_factory, needs_vllm, asked_for):
    """Of each case, what transformers answered and what vLLM did on two ranks."""
    root = tmp_path_factory.mktemp("served")
    jobs, wanted = [], {}
    for name in (name for name in (*FOLDERS, *OPTIONS) if name in asked_for):
        folder = root / name
        if name == "while loading":
            models.qwen3_moe().save_pretrained(folder)
            wanted[name] = models.reference(models.written(models.qwen3_moe(), root / "4 bit"))
        else:
            wanted[name] = models.reference(FOLDERS.get(name, FOLDERS["qwen3-moe"])(folder))
        jobs.append({"folder": str(folder), "options": {"tensor_parallel_size": 2, **OPTIONS.get(name, {})}})
    found = engine.run(root, jobs, ranks=2, timeout=1800)
    return {name: (wanted[name], answer) for name, answer in zip(wanted, found, strict=True)}


@some(*FOLDERS, *OPTIONS)
def test_tokens_are_those_of_transformers(served, name):
    wanted, answer = served[name]
    assert answer["tokens"] == wanted, answer.get("error")
    assert len(answer["layers"]) == 2


@pytest.mark.long
def test_a_pipeline_of_two(tmp_path, needs_vllm):
    """Each rank has its layers. The model runner of vLLM 0.32 for CPUs passes nothing on between them."""
    if torch.cuda.device_count() < 2:
        pytest.skip("a pipeline wants two GPUs")
    folder = models.written(models.mixtral(), tmp_path / "model")
    (answer,) = engine.run(tmp_path, [{"folder": str(folder), "options": {"pipeline_parallel_size": 2}}], ranks=2)
    assert answer["tokens"] == models.reference(folder), answer.get("error")
    first, second = answer["layers"]
    assert first and second and not set(first) & set(second)


@some("nf4", "double", "half blocks", "one head of k and v", "fused in the folder")
def test_each_rank_has_4_bit_layers(served, name):
    for found in served[name][1]["layers"]:
        assert len(found) == 8 and set(found.values()) == {"absmax code qweight"}


@some("qwen3-moe", "mixtral", "while loading", "by experts")
def test_each_rank_has_4_bit_experts(served, name):
    for found in served[name][1]["layers"]:
        assert sum("w13_qweight" in stored for stored in found.values()) == 2


@some("torn blocks")
def test_torn_blocks_are_in_16_bit_on_that_layer_alone(served, name):
    """176 columns on two ranks: no block of 32 or more ends at column 88. 144 of q are rows, which are whole."""
    for found in served[name][1]["layers"]:
        assert not any(name.endswith("down_proj") for name in found)
        assert sum(name.endswith("qkv_proj") for name in found) == 2
