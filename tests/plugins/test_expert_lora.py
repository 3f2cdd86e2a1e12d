"""peft's LoRA on stacked experts in 4 bits (`target_parameters`), against the same on the dequantized model."""

import copy
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

import fourbit
from fourbit.nn import ExpertWeights4bit
from tests.support import skip_or_fail

try:
    import peft
except ImportError:
    skip_or_fail("peft is not installed: pip install 'fourbit[test]'")
try:
    import transformers
except ImportError:
    skip_or_fail("transformers is not installed: pip install 'fourbit[test]'")

from fourbit_transformers.expert_forward import AdaptedExperts
from fourbit_transformers.experts import use_fourbit_experts
from tests.plugins.expert_models import MODELS, OWN_LOOPS, dense_twin, make

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # peft's: no name of a hub to look the base model up at, when it saves
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning"),
]
IDS = torch.arange(1, 25).view(2, 12)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def lora(**options):
    """An adapter that does something from the start, with a rank that grouped products have to fill up."""
    names = ["experts.gate_up_proj", "experts.down_proj"]
    options = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, "target_modules": [], **options}
    return peft.LoraConfig(target_parameters=names, **options)


def quantized(name, **config):
    """A model in 4 bits, and its twin with the dequantized weights, both without adapters."""
    plain = make(name)
    model = use_fourbit_experts(fourbit.quantize_model(copy.deepcopy(plain), fourbit.QuantConfig(**config)))
    return model, dense_twin(model, plain)


def adapters(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}


def tuned(name, **options):
    """Both with the same adapter."""
    model, twin = quantized(name)
    model, twin = peft.get_peft_model(model, lora(**options)), peft.get_peft_model(twin, lora(**options))
    assert set(adapters(model)) == set(adapters(twin)), "files of adapters fit both"
    twin.load_state_dict(adapters(model), strict=False)
    return model, twin


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def packed(model):
    return {
        f"{n}.{key}": tensor.clone()
        for n, m in model.named_modules()
        if isinstance(m, ExpertWeights4bit)
        for key, tensor in m.state_dict().items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_equals_lora_on_the_dequantized_model(name):
    """Logits and the gradients of the adapters, which alone have any."""
    model, twin = tuned(name)
    with model.disable_adapter():
        bare = logits(model)
    got, want = model(IDS).logits, twin(IDS).logits
    torch.testing.assert_close(got, want, **CLOSE)
    assert (got - bare).norm() > 0.05 * bare.norm()
    grads = []
    for each, out in ((model, got), (twin, want)):
        out.square().mean().backward()
        grads.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert set(grads[0]) == set(grads[1]) == set(adapters(model))
    for n, want_grad in grads[1].items():
        assert (grads[0][n] - want_grad).norm() < 1e-4 * want_grad.norm(), n


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_the_stacks_are_never_dequantized(name, monkeypatch):
    model, _ = tuned(name)

    def fail(*_):
        raise AssertionError("a whole stack in 16 bit")

    monkeypatch.setattr(ExpertWeights4bit, "dequantize", fail)
    model(IDS).logits.sum().backward()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_trains(name, checkpointing):
    """Five steps lower the loss, and leave the bits of the base alone."""
    model, _ = quantized(name)
    before = packed(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = peft.get_peft_model(model, lora(init_lora_weights=True)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(adapters(model)) and model.num_parameters() > 0
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1 and losses == sorted(losses, reverse=True)
    after = {n.removeprefix("base_model.model.").replace(".base_layer", ""): t for n, t in packed(model).items()}
    assert set(after) == set(before) and all(torch.equal(after[n], t) for n, t in before.items())


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss", "llama4"])
@pytest.mark.parametrize("safe", [False, True])
def test_merges_and_unmerges(name, safe):
    """The merged stack is the 4-bit form of the dequantized one plus the update, in its own place."""
    model, twin = tuned(name)
    want = twin.merge_and_unload(safe_merge=safe)
    merged = model.merge_and_unload(safe_merge=safe)
    assert not adapters(merged) and any(isinstance(m, ExpertWeights4bit) for m in merged.modules())
    for n, module in merged.named_modules():
        if isinstance(module, ExpertWeights4bit):
            dense = want.get_parameter(n).detach()
            torch.testing.assert_close(
                module.dequantize(), ExpertWeights4bit.from_parameter(dense).dequantize(), rtol=0, atol=1e-5
            )
    torch.testing.assert_close(logits(merged), logits(dense_twin(merged, want)), **CLOSE)

    model, _ = tuned(name)
    with model.disable_adapter():
        bare = logits(model)
    model.merge_adapter(safe_merge=safe)
    assert (logits(model) - bare).norm() > 0.05 * bare.norm()
    model.unmerge_adapter()
    with model.disable_adapter():
        assert (logits(model) - bare).norm() < 0.5 * bare.norm(), "rounded twice to 4 bits, and no more"


def test_merges_into_16_bit():
    """An adapter that was trained on 4 bits, merged into the weights that these stand for."""
    model, twin = tuned("qwen3-moe")
    want = logits(model)
    torch.testing.assert_close(logits(twin.merge_and_unload()), want, **CLOSE)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_saves_and_reloads(name, tmp_path):
    model, twin = tuned(name)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized(name)[0], tmp_path)
    assert torch.equal(logits(again), logits(model))
    on_dense = peft.PeftModel.from_pretrained(twin.unload(), tmp_path)
    torch.testing.assert_close(logits(on_dense), logits(model), **CLOSE)


def test_pickles_and_copies():
    model, _ = tuned("gpt-oss")
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(logits(again), logits(model))


def test_several_adapters():
    model, twin = tuned("qwen3-moe")
    for each in (model, twin):
        torch.manual_seed(5)
        each.add_adapter("other", lora(r=4))
    twin.load_state_dict(adapters(model), strict=False)
    first = logits(model)
    for names in ("other", ["default", "other"]):
        for each in (model, twin):
            each.base_model.set_adapter(names)
        torch.testing.assert_close(logits(model), logits(twin), **CLOSE)
        assert (logits(model) - first).norm() > 0.05 * first.norm()


def test_one_projection_of_two_and_one_in_16_bit():
    """The one that stays in 16 bit is peft's alone, and wrappers are nested as on a 16-bit model."""
    plain = make("qwen3-moe")
    for left in ("gate_up_proj", "down_proj"):
        config = fourbit.QuantConfig(skip_modules=(f"*.experts.{left}",))
        model = use_fourbit_experts(fourbit.quantize_model(copy.deepcopy(plain), config))
        twin = dense_twin(model, copy.deepcopy(plain))
        model, twin = peft.get_peft_model(model, lora()), peft.get_peft_model(twin, lora())
        assert {n: t.shape for n, t in adapters(model).items()} == {n: t.shape for n, t in adapters(twin).items()}
        twin.load_state_dict(adapters(model), strict=False)
        torch.testing.assert_close(logits(model), logits(twin), **CLOSE)
    model, _ = quantized("qwen3-moe")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    model = peft.get_peft_model(model, config)
    assert {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in adapters(model)} == {"q_proj", "experts"}


def test_quantized_after_the_adapter_was_attached():
    plain = peft.get_peft_model(make("gpt-oss"), lora())
    want = logits(plain)
    model = use_fourbit_experts(fourbit.quantize_model(copy.deepcopy(plain)))
    stacks = [m for m in model.modules() if isinstance(m, ExpertWeights4bit)]
    assert len(stacks) == 4
    twin = copy.deepcopy(plain)
    for n, module in model.named_modules():
        if isinstance(module, ExpertWeights4bit):
            twin.get_parameter(n).data = module.dequantize()
        elif isinstance(module, fourbit.nn.Linear4bit):
            twin.get_parameter(f"{n}.weight").data = module.dequantize()
    torch.testing.assert_close(logits(model), logits(twin), **CLOSE)
    assert 0 < (logits(model) - want).norm() < 0.7 * want.norm()


def test_a_dequantized_stack_is_peft_s_again():
    model, twin = tuned("qwen3-moe")
    for module in list(model.modules()):
        for n, child in list(module._modules.items()):
            if isinstance(child, ExpertWeights4bit):
                del module._modules[n]
                module.register_parameter(n, torch.nn.Parameter(child.dequantize(), requires_grad=False))
    model.base_model.model.set_experts_implementation("grouped_mm")
    torch.testing.assert_close(logits(model), logits(twin), **CLOSE)


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_bfloat16(name):
    plain = make(name).bfloat16()
    model = use_fourbit_experts(fourbit.quantize_model(copy.deepcopy(plain)))
    twin = dense_twin(model, plain)
    model, twin = peft.get_peft_model(model, lora()), peft.get_peft_model(twin, lora())
    twin.load_state_dict(adapters(model), strict=False)
    got, want = logits(model), logits(twin)
    assert got.dtype == torch.bfloat16 and (got - want).norm() < 0.05 * want.norm()


@pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="older versions of torch.compile break the graph in peft's own forward"
)
def test_compiles_whole():
    model, _ = tuned("gpt-oss")
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, model(IDS).logits, **CLOSE)


def test_the_recipe(tmp_path):
    """As the README has it: from a folder to trained adapters, and back to 4 bits and to 16."""
    from fourbit_transformers import FourbitConfig

    make("qwen3-moe").bfloat16().save_pretrained(tmp_path / "plain")
    config = FourbitConfig(double_quant=True, offload_experts=True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "plain", quantization_config=config, device_map="auto")
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, **targets)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    base = load(tmp_path / "plain", quantization_config=FourbitConfig(double_quant=True), device_map="auto")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=0.05, atol=0.05)
    want = logits(again)
    fourbit.dequantize_model(again)
    merged = again.merge_and_unload()
    assert not any(isinstance(m, ExpertWeights4bit) for m in merged.modules())
    assert (logits(merged) - want).norm() < 0.03 * want.norm()


def test_names_that_match_nothing_are_refused():
    model, _ = quantized("qwen3-moe")
    before = [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="target_parameters"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=[], target_parameters=["experts.nothing"]))
    assert [n for n, _ in model.named_parameters()] == before


def test_peft_is_imported_for_a_model_with_experts_alone():
    program = """
        import sys, warnings
        warnings.simplefilter("ignore")
        import fourbit, transformers, fourbit_transformers
        sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        sizes |= dict(num_key_value_heads=2)
        fourbit.quantize_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))
        assert "peft" not in sys.modules, "fourbit imports peft"
        config = transformers.MixtralConfig(**sizes, num_local_experts=2, num_experts_per_tok=1)
        fourbit.quantize_model(transformers.MixtralForCausalLM(config))
        kind = sys.modules["peft"].PEFT_TYPE_TO_TUNER_MAPPING["LORA"]
        assert kind.__module__ == "fourbit_transformers.expert_lora", kind
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=300)


def test_what_stands_in_the_weights_place_is_gone_afterwards():
    model, _ = tuned("qwen3-moe")
    owner = next(m for m in model.modules() if any(isinstance(c, ExpertWeights4bit) for c in m.children()))
    seen = []
    owner.register_forward_pre_hook(lambda module, args: seen.append(type(module.down_proj)))
    logits(model)
    owner.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDS)
    assert seen[0] is AdaptedExperts and isinstance(owner.down_proj, ExpertWeights4bit)
    assert not {"gate_up_proj", "down_proj"} & set(owner.__dict__)


def test_models_with_loops_of_their_own_are_tested():
    assert set(OWN_LOOPS) <= set(MODELS)
