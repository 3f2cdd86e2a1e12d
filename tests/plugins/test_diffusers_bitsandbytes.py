"""4-bit models of diffusers that bitsandbytes wrote, and that it is to read."""

from __future__ import annotations

import json

import pytest
import torch

import fourbit
from fourbit.nn import Linear4bit, PackedModule
from tests.plugins import diffusers_models as tiny
from tests.support import installed, skip_or_fail

if not installed("diffusers") or not installed("bitsandbytes"):
    skip_or_fail("diffusers or bitsandbytes is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def without_fourbit(monkeypatch):
    """diffusers' tables as they are where fourbit is not imported, and its bitsandbytes loader made to take a CPU."""
    import bitsandbytes as bnb
    import diffusers
    from diffusers.quantizers import auto, bitsandbytes

    import fourbit_diffusers  # noqa: F401  # whose entries stay when the fixture's are taken back

    diffusers.utils.logging.disable_progress_bar()
    theirs = bitsandbytes.BnB4BitDiffusersQuantizer
    # on some CPUs it repacks weights at the first forward pass, which it cannot do with such small ones
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes_4bit", diffusers.BitsAndBytesConfig)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit", theirs)
    monkeypatch.setattr(theirs, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(theirs, "update_device_map", lambda _, device_map: device_map or {"": "cpu"})


@pytest.fixture
def take_over():
    from fourbit_diffusers import take_over_bitsandbytes

    take_over_bitsandbytes()
    yield
    take_over_bitsandbytes(False)


@pytest.mark.parametrize("size", ("10GB", "3KB"))
@pytest.mark.parametrize("kind", ("unet", "wan"))
def test_it_reads_ours(without_fourbit, tmp_path, kind, size):
    """Of one file and of many, with layers in 16 bit by the model's choice and the caller's."""
    import bitsandbytes as bnb

    from fourbit_diffusers import FourbitConfig

    model = tiny.build(kind)
    model.save_pretrained(tmp_path / "16")
    config = FourbitConfig(compute_dtype="float32", skip_modules=["*attn2*"])
    ours = type(model).from_pretrained(tmp_path / "16", quantization_config=config)
    ours.save_pretrained(tmp_path / "4", max_shard_size=size)
    theirs = type(model).from_pretrained(tmp_path / "4", torch_dtype=torch.float32)
    layers = {name for name, module in theirs.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert layers == {name for name, module in ours.named_modules() if isinstance(module, Linear4bit)} != set()
    for name in layers:
        weight = theirs.get_submodule(name).weight
        want = ours.get_submodule(name).quant_state()[0]
        assert torch.equal(weight.data.flatten(), want.flatten())
        assert torch.equal(
            bnb.functional.dequantize_4bit(weight.data, weight.quant_state), ours.get_submodule(name).dequantize()
        )
    assert torch.allclose(tiny.run(theirs), tiny.run(ours), atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    (
        {"bnb_4bit_quant_type": "nf4"},
        {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16, "llm_int8_skip_modules": ["attn2"]},
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.float32},
    ),
)
def test_we_read_theirs(without_fourbit, tmp_path, monkeypatch, settings):
    """And write them again, so that both read them."""
    import bitsandbytes as bnb
    from diffusers import BitsAndBytesConfig
    from diffusers.quantizers import auto

    from fourbit_diffusers.config import FourbitConfig
    from fourbit_diffusers.quantizer import FourbitQuantizer

    model = tiny.build("unet")
    model.save_pretrained(tmp_path / "16")
    config = BitsAndBytesConfig(load_in_4bit=True, **settings)
    theirs = type(model).from_pretrained(tmp_path / "16", torch_dtype=torch.float32, quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    with monkeypatch.context() as patch:  # as take_over_bitsandbytes does; these tables are the fixture's
        patch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes_4bit", FourbitConfig)
        patch.setitem(auto.AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit", FourbitQuantizer)
        ours = type(model).from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours", torch_dtype=torch.float32)  # by bitsandbytes
    layers = {name for name, module in theirs.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert layers == {name for name, module in ours.named_modules() if isinstance(module, Linear4bit)} != set()
    for name in layers:
        for each in (theirs, again):
            weight = each.get_submodule(name).weight
            data = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(data, ours.get_submodule(name).dequantize())
    assert torch.allclose(tiny.run(theirs), tiny.run(ours), atol=1e-5)


def test_take_over(take_over, tmp_path):
    """What says bitsandbytes is fourbit's for as long as it has taken over, folders and configurations."""
    from diffusers import BitsAndBytesConfig

    from fourbit_diffusers import FourbitConfig, take_over_bitsandbytes

    model = tiny.build("unet")
    model.save_pretrained(tmp_path / "16")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["attn2", "down_blocks"]
    )
    ours = type(model).from_pretrained(tmp_path / "16", torch_dtype=torch.float32, quantization_config=config)
    names = [name for name, module in ours.named_modules() if isinstance(module, PackedModule)]
    assert names and not any("attn2" in name or name.startswith("down_blocks") for name in names)
    assert ours.get_submodule(LAYER).compute_dtype == torch.float32  # which bitsandbytes computes in if nothing is said
    ours.save_pretrained(tmp_path / "4")
    file = tmp_path / "4" / "config.json"
    settings = json.loads(file.read_text())
    del settings["quantization_config"]["fourbit"]  # as if bitsandbytes had written it
    file.write_text(json.dumps(settings))
    back = type(model).from_pretrained(tmp_path / "4")
    assert torch.equal(tiny.run(back), tiny.run(ours))
    take_over_bitsandbytes(False)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="No GPU found"):  # bitsandbytes is asked again
            type(model).from_pretrained(tmp_path / "4")
    take_over_bitsandbytes()
    with pytest.raises(ValueError, match="8-bit"):
        FourbitConfig.of(BitsAndBytesConfig(load_in_8bit=True))


def test_a_folder_of_the_command(without_fourbit, tmp_path):
    """bitsandbytes reads what `fourbit quantize` makes of a model of diffusers."""
    from fourbit.checkpoint.quantize import quantize_checkpoint

    model = tiny.build("unet")
    model.save_pretrained(tmp_path / "16")
    quantize_checkpoint(tmp_path / "16", tmp_path / "4", fourbit.QuantConfig(skip_modules=("attn2",)))
    theirs = type(model).from_pretrained(tmp_path / "4", torch_dtype=torch.float32)
    ours = fourbit.quantize_model(model, fourbit.QuantConfig(skip_modules=("attn2",)))
    assert torch.allclose(tiny.run(theirs), tiny.run(ours), atol=1e-5)
