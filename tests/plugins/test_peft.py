"""peft on 4-bit layers, with no glue: every method trains, moves the output, and merges."""

import copy

import pytest
import torch
from torch import nn

import fourbit
from fourbit.nn import Embedding4bit, Linear4bit
from tests.support import skip_or_fail

try:
    import peft
except ImportError:
    skip_or_fail("peft is not installed: pip install 'fourbit[test]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(32, 64)
        self.a = nn.Linear(64, 128)
        self.b = nn.Linear(128, 64)

    def forward(self, ids):
        return self.b(torch.relu(self.a(self.emb(ids))))


TARGETS = {"target_modules": ["a", "b"]}
METHODS = {
    "LoRA": lambda: peft.LoraConfig(r=4, **TARGETS),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **TARGETS),
    "PiSSA": lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", **TARGETS),
    "OLoRA": lambda: peft.LoraConfig(r=4, init_lora_weights="olora", **TARGETS),
    "VeRA": lambda: peft.VeraConfig(r=4, **TARGETS),
    "OFT": lambda: peft.OFTConfig(oft_block_size=16, **TARGETS),
    "IA3": lambda: peft.IA3Config(feedforward_modules=["b"], **TARGETS),
    "LoHa": lambda: peft.LoHaConfig(r=4, **TARGETS),
    "LoKr": lambda: peft.LoKrConfig(r=4, **TARGETS),
    "AdaLoRA": lambda: peft.AdaLoraConfig(r=4, init_r=4, total_step=10, **TARGETS),
    "MiSS": lambda: peft.MissConfig(r=4, **TARGETS),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=16, **TARGETS),
    "HRA": lambda: peft.HRAConfig(r=4, **TARGETS),
    "LoRA on the embedding": lambda: peft.LoraConfig(r=4, target_modules=["emb", "a"]),
}
REWRITES_THE_WEIGHT_AT_INIT = {"PiSSA", "OLoRA"}


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double_quant"])
def test_trains_and_merges(base, method, double_quant):
    torch.manual_seed(1)
    config = fourbit.QuantConfig(double_quant=double_quant)
    model = fourbit.quantize_model(copy.deepcopy(base), config)
    model.emb = Embedding4bit.from_embedding(model.emb, config)
    ids, target = torch.randint(0, 32, (4, 6)), torch.randn(4, 6, 64)
    frozen = {n: t.clone() for n, t in model.named_parameters() if not t.is_floating_point()}
    start = model(ids).detach()
    tuned = peft.get_peft_model(model, METHODS[method]())
    if method in REWRITES_THE_WEIGHT_AT_INIT:  # the residual is requantized: near, not equal
        assert (tuned(ids) - start).norm() < 0.25 * start.norm()
    else:
        torch.testing.assert_close(tuned(ids), start)
        after = {n.removeprefix("base_model.model.").replace(".base_layer", ""): t for n, t in tuned.named_parameters()}
        assert all(torch.equal(t, after[n]) for n, t in frozen.items())

    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (tuned(ids) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]

    tuned.eval()
    want = tuned(ids).detach()
    merged = tuned.merge_and_unload()
    assert isinstance(merged.a, Linear4bit)
    # what was learned is in the requantized weight: nearer to the tuned model than the base model is
    moved, off = (start - want).norm(), (merged(ids) - want).norm()
    assert off < 0.75 * moved and off < 0.35 * want.norm(), (off / moved, off / want.norm())


def test_unmerge_brings_the_bits_back(base):
    model = fourbit.quantize_model(copy.deepcopy(base))
    before = model.a.qweight.clone(), model.a.scales.clone()
    tuned = peft.get_peft_model(model, METHODS["LoRA"]())
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    layer = tuned.base_model.model.a
    layer.merge(safe_merge=True)
    assert not torch.equal(layer.base_layer.qweight, before[0])
    layer.unmerge()
    # merging rounds to 4 bits, so unmerging comes near, and no nearer
    restored = layer.base_layer.dequantize()
    fresh = Linear4bit.from_linear(base.a).dequantize()
    assert (restored - fresh).norm() < 0.2 * fresh.norm()


def test_adapters_save_without_the_base(base, tmp_path):
    model = fourbit.quantize_model(copy.deepcopy(base))
    tuned = peft.get_peft_model(model, METHODS["LoRA"]())
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.normal_()
    tuned.save_pretrained(tmp_path)
    ids = torch.arange(10)[None]
    again = peft.PeftModel.from_pretrained(fourbit.quantize_model(copy.deepcopy(base)), tmp_path)
    torch.testing.assert_close(again.eval()(ids), tuned.eval()(ids))
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 40_000


@pytest.mark.parametrize("method", METHODS)
def test_what_an_adapter_adds_is_never_quantized(method, base):
    """Of a model that has its adapters already, the base layers are quantized, and nothing else."""
    model = peft.get_peft_model(copy.deepcopy(base), METHODS[method]())
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters() if "base_layer" not in name}
    planned = fourbit.plan(model)
    assert {t.module.replace(".base_layer", "") for t in planned.quantized} == {
        *("base_model.model.a", "base_model.model.b")
    }
    fourbit.quantize_model(model)
    after = {name: (id(p), p.requires_grad) for name, p in model.named_parameters() if "base_layer" not in name}
    layers = {name for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert layers == {t.module for t in planned.quantized}
    assert after.items() >= {k: v for k, v in before.items() if f"{k.rpartition('.')[0]}" not in layers}.items()
    assert model(torch.arange(4)[None]).isfinite().all()
