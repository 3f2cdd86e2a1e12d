"""LoRA adapters that peft wrote, served by vLLM on 4-bit weights, answer as with peft on fourbit's modules."""

from __future__ import annotations

import pytest
import torch

from tests.support import need

need("transformers")

from tests.vllm import engine, models  # noqa: E402

pytestmark = pytest.mark.long

OPTIONS = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}


def _adapter(folder, path):
    """An adapter that changes the answers, and these."""
    need("peft")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import fourbit_transformers  # noqa: F401  (registers)

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(path)
    return models.answers(model.eval())


@pytest.mark.parametrize("ranks", [1, 2])
def test_tokens_are_those_of_peft(tmp_path, needs_vllm, ranks):
    folder = models.written(models.llama(), tmp_path / "model", double_quant=True)
    wanted = _adapter(folder, tmp_path / "adapter")
    assert wanted != models.reference(folder)
    job = {"folder": str(folder), "options": {**OPTIONS, "tensor_parallel_size": ranks}}
    found = engine.run(tmp_path, [{**job, "adapter": str(tmp_path / "adapter")}, job], ranks)
    assert [answer["tokens"] for answer in found] == [wanted, models.reference(folder)]
    assert all("base_layer" in name for name in found[0]["layers"][0])
