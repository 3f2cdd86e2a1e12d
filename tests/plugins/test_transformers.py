"""transformers models: quantized in memory, through a folder, with experts, offloaded, trained with adapters."""

import copy

import pytest
import torch

import fourbit
from fourbit.nn import ExpertWeights4bit, Linear4bit
from tests.support import skip_or_fail

try:
    import transformers
except ImportError:
    skip_or_fail("transformers is not installed: pip install 'fourbit[test]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": None,
    "bos_token_id": None,
}
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}


def llama(**more):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **more)).eval()


def qwen_moe():
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **EXPERTS)).eval()


def gpt_oss():
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16)
    model = transformers.GptOssForCausalLM(config).eval()
    with torch.no_grad():  # transformers leaves the experts of a new model uninitialized
        for name, p in model.named_parameters():
            if "expert" in name or "sinks" in name:
                p.normal_(std=0.05)
    return model


IDS = torch.arange(12)[None]
MODELS = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "qwen3 moe": qwen_moe,
    "gpt-oss": gpt_oss,
}


def dense_twin(quantized, plain):
    """The plain model with each weight replaced by what its 4-bit form dequantizes to."""
    twin = copy.deepcopy(plain)
    for name, module in quantized.named_modules():
        if isinstance(module, ExpertWeights4bit):
            twin.get_parameter(name).data = module.dequantize()
        elif isinstance(module, Linear4bit):
            twin.get_parameter(f"{name}.weight").data = module.dequantize()
    return twin


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("double_quant", [False, True])
@torch.no_grad()
def test_logits_are_those_of_the_dequantized_weights(kind, double_quant):
    plain = MODELS[kind]()
    model = fourbit.quantize_model(copy.deepcopy(plain), fourbit.QuantConfig(double_quant=double_quant), strict=True)
    left = [n for n, p in model.named_parameters() if p.is_floating_point() and p.dim() == 3]
    assert not left, "experts in 16 bit"
    torch.testing.assert_close(model(IDS).logits, dense_twin(model, plain)(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (model(IDS).logits - plain(IDS).logits).norm() < 0.9 * plain(IDS).logits.norm()


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_generates(kind):
    model = fourbit.quantize_model(MODELS[kind]())
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    # with a key-value cache as without
    logits = model(tokens[:, :-1]).logits[0, -1]
    assert tokens.shape == (1, 18) and int(logits.argmax()) == int(tokens[0, -1])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("double_quant", [False, True])
@torch.no_grad()
def test_through_a_folder(kind, double_quant, tmp_path):
    from fourbit.checkpoint.quantize import quantize_checkpoint
    from fourbit_transformers import load

    MODELS[kind]().to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    config = fourbit.QuantConfig(double_quant=double_quant)
    quantize_checkpoint(tmp_path / "plain", tmp_path / "small", config)
    model = load(tmp_path / "small")
    assert any(isinstance(m, Linear4bit) for m in model.modules())
    assert not any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers()))
    # Experts lie one by one on disk and are stacked in memory, where double quantization has another mean:
    # compare with the plain model whose weights are what the folder's 4-bit tensors dequantize to.
    torch.testing.assert_close(model(IDS).logits, dense_twin(model, plain)(IDS).logits, rtol=0, atol=0)
    want = fourbit.quantize_model(copy.deepcopy(plain), config)
    if kind != "qwen3 moe" or not double_quant:
        torch.testing.assert_close(model(IDS).logits, want(IDS).logits, rtol=0, atol=0)
    x = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert x.shape == (1, 15)


def test_a_plain_folder_loads_too(tmp_path):
    from fourbit_transformers import load

    plain = llama()
    plain.save_pretrained(tmp_path)
    torch.testing.assert_close(load(tmp_path)(IDS).logits, plain(IDS).logits)


def test_a_folder_that_does_not_fit_the_model_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    from fourbit_transformers import load

    llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    norm = "model.layers.0.input_layernorm.weight"
    for changed, error, message in [
        ({k: v for k, v in tensors.items() if k != norm}, ValueError, f"lacks '{norm}'"),
        ({**tensors, norm: torch.zeros(3)}, RuntimeError, "mismatched"),
    ]:
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(error, match=message):
            load(tmp_path)
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, file)
    load(tmp_path)


def test_qlora_with_gradient_checkpointing():
    import peft

    torch.manual_seed(0)
    model = fourbit.quantize_model(llama(), fourbit.QuantConfig(double_quant=True))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    adapted = [n for n, m in model.named_modules() if n.endswith("base_layer")]
    assert len(adapted) == 14, "every 4-bit layer has an adapter"
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


@torch.no_grad()
def test_accelerate_offload(tmp_path):
    from accelerate import cpu_offload, disk_offload

    for offload in (cpu_offload, lambda m, **k: disk_offload(m, offload_dir=str(tmp_path), **k)):
        model = fourbit.quantize_model(llama(), fourbit.QuantConfig(double_quant=True))
        want = model(IDS).logits
        offload(model, execution_device=torch.device("cpu"))
        torch.testing.assert_close(model(IDS).logits, want, rtol=0, atol=0)


def test_safetensors_save_model(tmp_path):
    from safetensors.torch import load_model, save_model

    model = fourbit.quantize_model(llama(tie_word_embeddings=True))
    save_model(model, str(tmp_path / "m.safetensors"))
    other = fourbit.quantize_model(llama(tie_word_embeddings=True))
    for p in other.parameters():
        p.data.zero_()
    load_model(other, str(tmp_path / "m.safetensors"))
    torch.testing.assert_close(other(IDS).logits, model(IDS).logits, rtol=0, atol=0)


@torch.no_grad()
def test_compiles_whole():
    torch._dynamo.reset()
    model = fourbit.quantize_model(llama(), fourbit.QuantConfig(double_quant=True))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
