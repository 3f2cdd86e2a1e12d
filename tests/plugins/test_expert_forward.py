"""The experts implementation "fourbit" of transformers: equal to "eager" on the dequantized weights, and compiled."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fourbit
from fourbit.nn import ExpertWeights4bit
from tests.support import skip_or_fail

try:
    import transformers
except ImportError:
    skip_or_fail("transformers is not installed: pip install 'fourbit[test]'")

from fourbit_transformers import expert_forward
from fourbit_transformers.expert_forward import IMPLEMENTATION
from fourbit_transformers.experts import use_fourbit_experts
from tests.plugins.expert_models import MODELS, MODULES, OWN_LOOPS, dense_twin, experts, make

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
IDS = torch.arange(1, 25).view(2, 12)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def routed(tokens, count=5, k=2, hidden=64, dtype=torch.float32):
    """States, experts' numbers and weights of `tokens`; expert 1 gets none."""
    torch.manual_seed(tokens)
    scores = torch.rand(tokens, count)
    scores[:, 1] = -1
    index = scores.topk(k).indices
    states = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    return states, index, torch.rand(tokens, k, dtype=dtype, requires_grad=True)


def in_4_bits(module, *, only="", **config):
    """A copy on the implementation "fourbit", and one on "eager" with the dequantized weights."""
    keep = () if not only else tuple(n for n in ("gate_up_proj", "up_proj", "down_proj") if n != only)
    holder = nn.ModuleDict({"experts": copy.deepcopy(module)})
    skips = tuple(f"experts.{name}" for name in keep)
    fourbit.quantize_model(holder, fourbit.QuantConfig(skip_modules=skips, **config))
    small = holder["experts"]
    assert any(isinstance(child, ExpertWeights4bit) for child in small.children())
    small.config = copy.copy(module.config)
    small.config._experts_implementation = IMPLEMENTATION
    twin = dense_twin(small, copy.deepcopy(module))
    twin.config._experts_implementation = "eager"
    return small, twin


def gradients(module, states, index, weights):
    """The output, its gradients for states and weights, and those of the module's own small parameters."""
    states, weights = states.detach().requires_grad_(), weights.detach().requires_grad_()
    out = module(states, index, weights)
    small = [p for n, p in module.named_parameters() if p.dim() < 3 and p.is_floating_point()]
    found = torch.autograd.grad(out, [states, weights, *small], torch.ones_like(out) + out.detach())
    return out.detach(), found


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_is_eager_on_the_dequantized_weights(kind, double_quant):
    small, twin = in_4_bits(experts(kind), double_quant=double_quant)
    for tokens in (1, 13, 40):
        given = routed(tokens)
        (got, got_grads), (want, want_grads) = gradients(small, *given), gradients(twin, *given)
        torch.testing.assert_close(got, want, **CLOSE)
        assert want.abs().max() > 0.1
        for a, b in zip(got_grads, want_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3-moe", "transposed, bias"])
def test_blocks_that_run_across_experts(kind):
    module = experts(kind, hidden=20, intermediate=12, count=5)
    small, twin = in_4_bits(module)
    given = routed(9, hidden=20)
    for a, b in zip(gradients(small, *given)[1], gradients(twin, *given)[1], strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("kind", ["qwen3-moe", "transposed, bias, interleaved gate", "no gate"])
@pytest.mark.parametrize("half", ["first", "second"])
def test_one_projection_in_4_bits_and_one_in_16(kind, half):
    module = experts(kind).bfloat16()
    first = "up_proj" if kind == "no gate" else "gate_up_proj"
    small, twin = in_4_bits(module, only=first if half == "first" else "down_proj")
    assert {type(getattr(small, name)) for name in (first, "down_proj")} == {ExpertWeights4bit, nn.Parameter}
    given = routed(21, dtype=torch.bfloat16)
    got, want = small(*given), twin(*given)
    assert got.dtype == torch.bfloat16 and (got - want).norm() < 0.01 * want.norm()
    (grad,) = torch.autograd.grad(got.sum(), given[0])
    (want_grad,) = torch.autograd.grad(want.sum(), given[0])
    assert (grad - want_grad).norm() < 0.02 * want_grad.norm()


@pytest.mark.parametrize("kind", ["qwen3-moe", "transposed, bias", "norm after each expert"])
@pytest.mark.parametrize("only", ["", "down_proj", "gate_up_proj"], ids=["4-bit", "second", "first"])
def test_experts_of_other_ranks_add_nothing(kind, only, monkeypatch):
    """Expert parallelism marks them by numbers from num_experts on."""
    dense = expert_forward._grouped_linear

    def leaves_the_rest(x, weights, offsets, **options):
        """As on a GPU: rows after the last offset are whatever was there, and so are their gradients."""
        rest = (torch.arange(len(x)) >= offsets[-1]).unsqueeze(-1)
        x = x.clone()
        x.register_hook(lambda grad: grad.masked_fill(rest, torch.nan))
        return dense(x, weights, offsets, **options).masked_fill(rest, torch.nan)

    monkeypatch.setattr(expert_forward, "_grouped_linear", leaves_the_rest)
    small, twin = in_4_bits(experts(kind), only=only)
    small._is_expert_parallel = True
    states, index, weights = routed(17)
    elsewhere = torch.rand(index.shape) < 0.4
    elsewhere[3] = True
    got = small(states, index.masked_fill(elsewhere, small.num_experts), weights)
    want = twin(states, index, weights.masked_fill(elsewhere, 0))
    torch.testing.assert_close(got, want, **CLOSE)
    assert not bool(got[3].any())
    for a, b in zip(*(torch.autograd.grad(out.sum(), [states, weights]) for out in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3-moe", "transposed, bias, interleaved gate"])
def test_compiles_whole_for_any_number_of_tokens(kind):
    small, _ = in_4_bits(experts(kind))
    compiled = torch.compile(small, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    for tokens in (13, 40, 7):
        if tokens == 7:
            torch.compiler.set_stance("fail_on_recompile")
        try:
            given = routed(tokens)
            (got, got_grads), (want, want_grads) = gradients(compiled, *given), gradients(small, *given)
        finally:
            torch.compiler.set_stance("default")
        torch.testing.assert_close(got, want, **CLOSE)
        for a, b in zip(got_grads, want_grads, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("kind", ["qwen3-moe", "transposed"])
def test_autocast(kind):
    small, twin = in_4_bits(experts(kind))
    given = routed(11)
    twin.config._experts_implementation = "batched_mm"  # "eager" adds bfloat16 to float32
    with torch.autocast("cpu", torch.bfloat16):
        got, want = small(*given), twin(*given)
    exact = twin(*given)
    assert got.dtype == want.dtype
    assert 0 < (got - exact).norm() < 0.02 * exact.norm(), "computed in bfloat16"


# ---- whole models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_models_run_on_it_with_equal_logits_and_gradients(name):
    plain = make(name)
    model = fourbit.quantize_model(copy.deepcopy(plain))  # which tells transformers' plugin
    assert any(isinstance(m, ExpertWeights4bit) for m in model.modules())
    twin = dense_twin(model, plain)
    if name not in OWN_LOOPS:
        assert model.config._experts_implementation == "fourbit"
        twin.set_experts_implementation("eager")
    found = []
    for each in (model, twin):
        embedded = each.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = each(inputs_embeds=embedded).logits
        found.append((logits, *torch.autograd.grad(logits.square().sum(), embedded)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.detach().abs().max()))


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek-v3"])
def test_models_compile_whole(name):
    model = use_fourbit_experts(fourbit.quantize_model(make(name)))
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, model(IDS).logits, **CLOSE)


def test_generates():
    model = use_fourbit_experts(fourbit.quantize_model(make("qwen3-moe")))
    tokens = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    with torch.no_grad():  # with a key-value cache as without
        assert int(model(tokens[:, :-1]).logits[0, -1].argmax()) == int(tokens[0, -1])


def test_the_loop_that_was_asked_for_is_kept():
    plain = make("qwen3-moe")
    plain.set_experts_implementation("eager")
    model = use_fourbit_experts(fourbit.quantize_model(copy.deepcopy(plain)))
    assert model.config._experts_implementation == "eager"
    torch.testing.assert_close(model(IDS).logits, dense_twin(model, plain)(IDS).logits, **CLOSE)


def test_models_inside_others_and_16_bit_ones():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = make("qwen3-moe"), make("gpt-oss"), make("mixtral")

    pair = Pair()
    fourbit.quantize_model(pair, fourbit.QuantConfig(skip_modules=("third",)))
    use_fourbit_experts(pair)
    names = [m.config._experts_implementation for m in (pair.first, pair.second, pair.third)]
    assert names == ["fourbit", "fourbit", "grouped_mm"]


def test_the_name_leaves_no_trace_in_files_and_comes_with_pickles(tmp_path):
    model = use_fourbit_experts(fourbit.quantize_model(make("qwen3-moe")))
    model.config.save_pretrained(tmp_path)
    assert "experts_implementation" not in (tmp_path / "config.json").read_text()
    assert transformers.AutoConfig.from_pretrained(tmp_path)._experts_implementation is None
    # a process that unpickles the model and has not heard of fourbit finds the implementation registered
    assert b"fourbit_transformers.expert_forward" in pickle.dumps(model.config)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert copy.deepcopy(model).config._experts_implementation == IMPLEMENTATION == "fourbit"
