"""plan and quantize_model: every tensor is accounted for, by rule, and the plan is what happens."""

import pytest
import torch
from torch import nn

import fourbit
from fourbit.nn import ExpertWeights4bit, Linear4bit
from fourbit.nn.quantize import LargeTensorError


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 32))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(4, 64))

    def forward(self, x):
        return sum(nn.functional.linear(x, self.gate_up_proj[e]) for e in range(4))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(32, 32)
        self.v_proj = nn.Linear(32, 32, bias=False)
        self.gate = nn.Linear(32, 4, bias=False)
        self.experts = Experts()
        self.norm = nn.LayerNorm(32)

    def forward(self, x):
        return self.experts(self.norm(self.v_proj(self.q_proj(x)))) + self.gate(x).sum()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(100, 32)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv1d(32, 32, 3)
        self.mystery = nn.Parameter(torch.randn(8, 8))
        self.lm_head = nn.Linear(32, 100, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids):
        x = self.embed_tokens(ids)
        return self.layers[0](x)


RULES = {
    "mystery": ("skip", "Model is not a linear layer that fourbit knows"),
    "embed_tokens.weight": ("skip", "embedding"),
    "layers.0.q_proj.weight": ("quantize", "linear weight"),
    "layers.0.q_proj.bias": ("skip", "not a matrix (norm, bias or scalar)"),
    "layers.0.v_proj.weight": ("quantize", "linear weight"),
    "layers.0.gate.weight": ("skip", "router of a mixture of experts"),
    "layers.0.experts.gate_up_proj": ("quantize", "stacked expert weights"),
    "layers.0.experts.gate_up_proj_bias": ("skip", "bias"),
    "layers.0.norm.weight": ("skip", "not a matrix (norm, bias or scalar)"),
    "conv.weight": ("skip", "convolution"),
    "lm_head.weight": ("skip", "tied to embed_tokens.weight"),
}


def test_every_tensor_has_a_rule():
    model = Model()
    plan = fourbit.plan(model)
    by_name = {t.name: t for t in plan.tensors}
    assert set(by_name) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, (action, rule) in RULES.items():
        assert (by_name[name].action, by_name[name].rule) == (action, rule), name


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_bytes_are_those_that_come_out(double_quant):
    model = Model()
    config = fourbit.QuantConfig(double_quant=double_quant)
    plan = fourbit.plan(model, config)
    assert plan.bytes_before == sum(p.nbytes for p in model.parameters())
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    fourbit.quantize_model(model, config)
    after = sum(p.nbytes for p in model.parameters())
    after += sum(b.nbytes for n, b in model.named_buffers() if n.endswith(("nested_scales", "nested_offset")))
    assert plan.bytes_after == after
    count, size = plan.quantized_parameters, sum(t.bytes_after for t in plan.quantized)
    assert plan.bits_per_quantized_parameter == 8 * size / count
    assert plan.bits_per_parameter == 8 * plan.bytes_after / plan.parameters
    if not double_quant:
        assert plan.bits_per_quantized_parameter == 4.5


def test_the_plan_is_what_happens():
    model = Model()
    plan = fourbit.plan(model)
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids)
    assert fourbit.quantize_model(model) is model
    modules = dict(model.named_modules())
    for t in plan.quantized:
        kind, name = (Linear4bit, t.module) if t.kind == "linear" else (ExpertWeights4bit, t.name)
        assert isinstance(modules[name], kind)
    left = {n for n, m in modules.items() if isinstance(m, nn.Linear) and not isinstance(m, Linear4bit)}
    assert left == {"layers.0.gate", "layers.1.gate", "lm_head"}
    assert model.lm_head.weight is model.embed_tokens.weight
    after = model(ids)
    assert 0 < (after - before).norm() / before.norm() < 0.3
    assert all(t.rule == "4-bit already" for t in fourbit.plan(model).tensors if t.name.endswith("qweight"))


def test_skip_modules_add_to_the_rules():
    plan = fourbit.plan(Model(), fourbit.QuantConfig(skip_modules=["v_proj", "layers.1.*", "mystery"]))
    by_name = {t.name: t for t in plan.tensors}
    assert by_name["layers.0.v_proj.weight"].rule == "skip_modules: v_proj"
    assert by_name["layers.1.q_proj.weight"].rule == "skip_modules: layers.1.*"
    assert by_name["layers.0.q_proj.weight"].action == "quantize"
    assert by_name["mystery"].rule == "skip_modules: mystery"


class Big(nn.Module):
    def __init__(self):
        super().__init__()
        self.big = nn.Parameter(torch.zeros(1024, 1024))
        self.linear = nn.Linear(8, 8)


def test_a_large_tensor_that_stays_is_impossible_to_miss():
    plan = fourbit.plan(Big())
    assert [t.name for t in plan.large_left] == ["big"]
    assert "WARNING: big" in plan.summary() and "LARGE" in str(plan)
    assert plan.to_dict()["large_left"] == ["big"]
    model = Big()
    with pytest.raises(LargeTensorError, match=r"big \[1024, 1024\]"):
        fourbit.quantize_model(model, strict=True)
    assert type(model.linear) is nn.Linear
    fourbit.quantize_model(model, fourbit.QuantConfig(skip_modules=["big"]), strict=True)
    assert type(model.linear) is Linear4bit


def test_a_deliberately_kept_large_tensor_is_still_named():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(1024, 1024)

    plan = fourbit.plan(Head())
    assert not plan.large_left
    assert "lm_head.weight" in plan.summary() and "output head" in plan.summary()


def test_a_bad_value_stops_before_anything_has_changed():
    model = Model()
    model.layers[1].experts.gate_up_proj.data[2, 3, 4] = torch.inf
    with pytest.raises(fourbit.NonFiniteError, match=r"layers\.1\.experts\.gate_up_proj .* \[2, 3, 4\]"):
        fourbit.quantize_model(model)
    assert not any(isinstance(m, Linear4bit) for m in model.modules())


def test_shared_modules_stay_shared():
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    fourbit.quantize_model(model)
    assert isinstance(model["a"][0], Linear4bit)
    assert model["a"][0] is model["b"][0]


def test_a_meta_model_is_prepared_and_filled():
    config = fourbit.QuantConfig(double_quant=True)
    full = fourbit.quantize_model(Model(), config)
    with torch.device("meta"):
        empty = Model()
    fourbit.quantize_model(empty, config)
    empty.load_state_dict(full.state_dict(), assign=True)
    ids = torch.tensor([[5, 6]])
    assert torch.equal(empty(ids), full(ids))


def test_modules_with_a_forward_of_their_own_are_left():
    class Special(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    plan = fourbit.plan(nn.Sequential(Special(8, 8)))
    assert [t.action for t in plan.tensors] == ["skip", "skip"]
    assert "Special" in plan.tensors[0].rule


def test_multihead_attention_is_left():
    """Its out_proj is a subclass of nn.Linear, which no reader of a folder replaces: memory does as folders do."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    before, _ = attention(x, x, x)
    by_name = {t.name: t for t in fourbit.plan(attention).tensors}
    assert by_name["out_proj.weight"].rule == "NonDynamicallyQuantizableLinear is not a linear layer that fourbit knows"
    fourbit.quantize_model(attention)
    after, _ = attention(x, x, x)
    assert torch.equal(after, before)
