"""from_pretrained(tp_plan="auto") on 4-bit models, over gloo processes on this machine."""

import hashlib
import logging
import re
from pathlib import Path

import pytest
import torch
import transformers as T
from safetensors import safe_open

import fourbit
from fourbit.nn import ExpertWeights4bit, PackedModule
from fourbit_transformers import FourbitConfig
from fourbit_transformers.tensor_parallel import WHOLE
from tests.plugins.expert_models import SIZES, make, randomize
from tests.processes import spawn

pytestmark = pytest.mark.long
IDS = torch.arange(12).reshape(2, 6) + 5


def llama():
    """One whose blocks, and groups of double-quantized scales, cross borders."""
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 96, "intermediate_size": 160, "num_key_value_heads": 4, "attention_bias": True}
    return randomize(T.LlamaForCausalLM(T.LlamaConfig(**sizes, tie_word_embeddings=False))).eval()


def of_one_process(model, folder):
    """The model's folder and options for quantizing it; and the same for the 4-bit folder; each with its results."""
    model.save_pretrained(folder / "plain")
    config = FourbitConfig(double_quant=True, blocksize=64)
    cases = []
    for source, options in ((folder / "plain", {"quantization_config": config}), (folder / "packed", {})):
        whole = T.AutoModelForCausalLM.from_pretrained(source, **options)
        goal = folder / ("packed" if options else "again")
        whole.save_pretrained(goal)
        with torch.no_grad():
            cases.append((str(source), options, str(goal), whole(IDS).logits))
    return cases, any(isinstance(m, ExpertWeights4bit) for m in whole.modules())


def digests(folder):
    """Of each tensor of a folder's files."""
    found = {}
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name).contiguous().view(-1).view(torch.uint8)
                found[name] = hashlib.sha256(bytes(tensor.tolist())).hexdigest()
    return found


def run(rank, cases, folder):
    for source, options, reference, want in cases:
        model = T.AutoModelForCausalLM.from_pretrained(source, tp_plan="auto", **options)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, PackedModule)}
        planned = {name for name in layers if model.tp_plan.get(re.sub(r"\d+", "*", name)) == WHOLE}
        assert {name for name, layer in layers.items() if layer.split is not None} == planned != set()
        assert "decoded to float32" in "".join(fourbit.explain(layer).part for layer in layers.values())
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, want, rtol=1e-3, atol=1e-3)
        goal = f"{folder}/{len(options)}"
        model.save_pretrained(goal)
        torch.distributed.barrier()  # older versions of transformers write in every process
        if rank == 0:
            found, wanted = digests(goal), digests(reference)
            assert found.keys() == wanted.keys()
            assert [name for name in found if found[name] != wanted[name]] == []


def run_refused(rank, folder):
    config = FourbitConfig(blocksize=64)
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    for plan in ({"model.layers.*.self_attn.q_proj": "colwise"}, {"model.layers.*.mlp.down_proj": "rowwise"}):
        said.clear()
        with pytest.raises(RuntimeError, match="look at the `CONVERSION` entries"):
            T.AutoModelForCausalLM.from_pretrained(folder, tp_plan=plan, quantization_config=config)
        assert "fourbit carries out the model's own plan" in "".join(said)


def test_another_plan_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    spawn(run_refused, str(tmp_path))


@pytest.mark.parametrize("name", ("llama", "qwen3-moe", "mixtral", "deepseek-v3", "olmoe"))
def test_same_as_one_process(name, tmp_path):
    cases, experts = of_one_process(llama() if name == "llama" else make(name), tmp_path)
    assert experts == (name != "llama")
    spawn(run, cases, str(tmp_path / "divided"))
