"""Files go both ways between fourbit and the real bitsandbytes, on the CPU, with the same bits.

Shapes are such that the blocksize divides the last dimension: bitsandbytes 0.50.2 dequantizes others wrongly
on the CPU.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fourbit
from fourbit.checkpoint import Checkpoint
from fourbit.checkpoint.dequantize import dequantize_checkpoint
from fourbit.checkpoint.inspect import inspect_checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from tests.folders import write_folder
from tests.support import skip_or_fail

try:
    import bitsandbytes
    import bitsandbytes.functional as bnb
except ImportError:
    bitsandbytes = None

CASES = [
    pytest.param(quant_type, double_quant, dtype, id=f"{quant_type}-{'double' if double_quant else 'single'}-{name}")
    for quant_type in ("nf4", "fp4")
    for double_quant in (False, True)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
]


@pytest.fixture(autouse=True)
def _needs_bitsandbytes():
    if bitsandbytes is None:
        skip_or_fail("bitsandbytes is not installed: files are not exchanged with it")


@pytest.mark.parametrize(("quant_type", "double_quant", "dtype"), CASES)
@pytest.mark.parametrize("blocksize", (64, 256))
def test_bitsandbytes_reads_ours(tmp_path, quant_type, double_quant, dtype, blocksize):
    tensors = {
        "a.q_proj.weight": torch.randn(96, 256).to(dtype),
        "a.k_proj.weight": torch.randn(3, 512).to(dtype),
        # odd sizes between them, and more than 256 scales
        "a.o_proj.weight": (torch.randn(300, 256) ** 3).to(dtype),
        "a.norm.weight": torch.randn(3).to(dtype),
    }
    src = write_folder(tmp_path / "src", tensors)
    config = fourbit.QuantConfig(quant_type, blocksize, double_quant)
    quantize_checkpoint(src, tmp_path / "dst", config)
    ours = Checkpoint(tmp_path / "dst")
    with safe_open(tmp_path / "dst" / "model.safetensors", framework="pt") as file:  # as transformers reads it
        for name in list(tensors)[:3]:
            stats = {key: file.get_tensor(key) for key in ours.quantized()[name]}
            stats = {key.removeprefix(name + "."): tensor for key, tensor in stats.items()}
            state = bnb.QuantState.from_dict(stats, device=torch.device("cpu"))
            theirs = bnb.dequantize_4bit(file.get_tensor(name), state)
            assert theirs.dtype == dtype and theirs.shape == tensors[name].shape
            assert torch.equal(theirs, fourbit.dequantize_4bit(*ours.read_4bit(name)))


@pytest.mark.parametrize(("quant_type", "double_quant", "dtype"), CASES)
@pytest.mark.parametrize("storage", (torch.uint8, torch.bfloat16))
def test_we_read_theirs(tmp_path, quant_type, double_quant, dtype, storage):
    layer = bitsandbytes.nn.Linear4bit(
        *(256, 300),
        bias=True,
        quant_type=quant_type,
        compress_statistics=double_quant,
        quant_storage=storage,
    )
    w = torch.randn(300, 256).to(dtype)
    layer.weight = bitsandbytes.nn.Params4bit(
        w, False, quant_type=quant_type, compress_statistics=double_quant, quant_storage=storage, module=layer
    )
    layer.to("cpu")
    assert layer.weight.quant_state is not None
    want = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    path = tmp_path / "theirs.safetensors"
    save_file({f"x.{name}": tensor.contiguous() for name, tensor in layer.state_dict().items()}, path)
    checkpoint = Checkpoint(path)
    assert list(checkpoint.quantized()) == ["x.weight"]
    packed, state = checkpoint.read_4bit("x.weight")
    assert (state.quant_type, state.double_quant, state.dtype) == (quant_type, double_quant, dtype)
    assert torch.equal(fourbit.dequantize_4bit(packed, state), want)
    facts = {t.name: t for t in inspect_checkpoint(path).tensors}
    assert facts["x.weight"].shape == (300, 256) and facts["x.weight"].type == quant_type
    assert facts["x.weight"].bits_per_parameter == pytest.approx(4.5 - 0.373 * double_quant, abs=2e-2)


@pytest.mark.parametrize(("quant_type", "double_quant", "dtype"), CASES)
def test_dequantize_of_theirs(tmp_path, quant_type, double_quant, dtype):
    """`fourbit dequantize` of a folder that bitsandbytes made is what bitsandbytes itself makes of it."""
    tensors, want = {"norm.weight": torch.ones(5).to(dtype)}, {}
    for i, shape in enumerate(((300, 256), (3, 512), (96, 64))):
        w = torch.randn(*shape, generator=torch.Generator().manual_seed(i)).to(dtype)
        options = {"quant_type": quant_type, "compress_statistics": double_quant}
        packed, state = bnb.quantize_4bit(w, **options)
        want[f"a.{i}.weight"] = bnb.dequantize_4bit(packed, state)
        parts = {"": packed} | {f".{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
        tensors |= {f"a.{i}.weight{key}": tensor.contiguous() for key, tensor in parts.items()}
    src = write_folder(tmp_path / "src", tensors, shards=2)
    entry = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": quant_type}
    (src / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": entry}))
    report = dequantize_checkpoint(src, tmp_path / "dst")
    assert set(report.dequantized) == set(want) and report.carried == ("norm.weight",)
    with Checkpoint(tmp_path / "dst") as written:
        assert written.config == {"model_type": "llama"}
        for name, tensor in want.items():
            found = written.read(name)
            assert found.dtype == dtype and torch.equal(found, tensor)


@pytest.mark.long
@pytest.mark.parametrize("double_quant", (False, True))
def test_transformers_with_bitsandbytes_loads_ours(tmp_path, double_quant):
    """A model quantized by us, loaded as any bitsandbytes model: same weights, and logits as close as bf16 allows."""
    try:
        import accelerate  # noqa: F401
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        skip_or_fail(f"{error}: loading with transformers and bitsandbytes is not tried")
    from fourbit_transformers import load
    from tests.support import for_bitsandbytes

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 200}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "src")
    quantize_checkpoint(
        tmp_path / "src", tmp_path / "dst", fourbit.QuantConfig(blocksize=64, double_quant=double_quant)
    )

    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dst", dtype=torch.bfloat16, device_map="cpu", config=for_bitsandbytes(tmp_path / "dst")
    )
    ours = load(tmp_path / "dst")
    linears = [name for name, m in theirs.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(linears) == 14 and "lm_head" not in linears
    with Checkpoint(tmp_path / "dst") as checkpoint:
        assert {f"{name}.weight" for name in linears} == set(checkpoint.quantized())
        for name in linears:
            weight = theirs.get_submodule(name).weight
            want = fourbit.dequantize_4bit(*checkpoint.read_4bit(f"{name}.weight"))
            assert torch.equal(bnb.dequantize_4bit(weight.data, weight.quant_state), want)
    ids = torch.randint(0, 200, (1, 16))
    with torch.inference_mode():
        a, b = ours(ids).logits.float(), theirs(ids).logits.float()
    assert torch.allclose(a, b, atol=0.03 * float(a.abs().max()))
