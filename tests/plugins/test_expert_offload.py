"""Stacked experts that stay in host memory. Without CUDA their copies are made on the CPU, and all else is the same."""

import copy
import gc
import pickle

import pytest
import torch

import fourbit
from fourbit.nn import ExpertWeights4bit
from tests.support import skip_or_fail, skip_without_device

try:
    import transformers  # noqa: F401
except ImportError:
    skip_or_fail("transformers is not installed: pip install 'fourbit[test]'")

from fourbit_transformers.expert_offload import OffloadedExperts, offload, offload_experts
from fourbit_transformers.expert_stream import KEPT, Streamer
from fourbit_transformers.experts import use_fourbit_experts
from tests.plugins.expert_models import MODELS, make

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
IDS = torch.arange(1, 25).view(2, 12)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        skip_without_device("needs a GPU")
    return torch.device("cuda", 0)


def pair(name, device, layers=None, **config):
    """A 4-bit model on the device, and the same with its experts in host memory."""
    plain = make(name) if layers is None else deep(layers)
    model = use_fourbit_experts(fourbit.quantize_model(plain, fourbit.QuantConfig(blocksize=64, **config))).to(device)
    offloaded = copy.deepcopy(model)
    offload(offloaded, Streamer(device, always=True))
    return model, offloaded


def deep(layers):
    """A Qwen3-MoE of many layers with 8 experts each."""
    from tests.plugins.expert_models import SIZES, randomize

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **{**SIZES, "num_hidden_layers": layers},
        **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    )
    return randomize(transformers.Qwen3MoeForCausalLM(config)).eval()


def stacks(model):
    return [m for m in model.modules() if isinstance(m, ExpertWeights4bit)]


def gradients(model, ids):
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    (grad,) = torch.autograd.grad(logits.square().mean(), embedded)
    return logits.detach(), grad


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_logits_and_gradients_are_those_of_the_model_in_one_place(name, double_quant, device):
    model, offloaded = pair(name, device, double_quant=double_quant)
    assert all(type(s) is OffloadedExperts and s.qweight.device.type == "cpu" for s in stacks(offloaded))
    for ids in (IDS.to(device), IDS[:1, :1].to(device)):  # the stack, and the experts that are hit
        for got, want in zip(gradients(offloaded, ids), gradients(model, ids), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_few_rows_copy_the_experts_they_hit(device, monkeypatch):
    model, offloaded = pair("", device, layers=2)
    fetched, copied = [], []
    fetch, some = Streamer.fetch, OffloadedExperts._experts
    monkeypatch.setattr(Streamer, "fetch", lambda self, *a: fetched.append(a[0].place) or fetch(self, *a))
    monkeypatch.setattr(OffloadedExperts, "_experts", lambda s, hit, *a: copied.append(hit) or some(s, hit, *a))
    with torch.no_grad():
        want, got = model(IDS[:1, :2].to(device)).logits, offloaded(IDS[:1, :2].to(device)).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not fetched and len(copied) == 4 and all(1 <= len(hit) <= 4 and hit == sorted(set(hit)) for hit in copied)
    offloaded(IDS.to(device))
    assert fetched == [0, 1, 2, 3]


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "checkpointing"])
def test_training_is_the_same_and_guesses_what_comes_next(device, checkpointing, monkeypatch):
    """From the second step on, no stack is copied that is not used, and none only when it is waited for."""
    model, offloaded = pair("", device, layers=5)
    ids = IDS.to(device)
    events = []
    start, fetch = Streamer._start, Streamer.fetch

    def fetching(self, stack, gradient=False):
        events.append(("fetch", stack.place, stack.place in self._copies))
        return fetch(self, stack, gradient)

    monkeypatch.setattr(
        Streamer, "_start", lambda self, stack: events.append(("start", stack.place)) or start(self, stack)
    )
    monkeypatch.setattr(Streamer, "fetch", fetching)
    for each in (model, offloaded):
        each.train()
        each.requires_grad_(False)
        for layer in each.model.layers:
            layer.self_attn.q_norm.weight.requires_grad_(True)
        if checkpointing is not None:
            each.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            each.enable_input_require_grads()
    for step in range(3):
        events.clear()
        grads = []
        for each in (model, offloaded):
            each.zero_grad()
            loss = each(ids, labels=ids).loss
            loss.backward()
            grads.append([p.grad for p in each.parameters() if p.requires_grad])
        assert len(grads[0]) == 5
        for want, got in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        streamer = stacks(offloaded)[0].streamer
        assert len(streamer._copies) <= KEPT and all(s.streamer is streamer for s in stacks(offloaded))
        if step == 2:
            used = [e for e in events if e[0] == "fetch"]
            started = [e for e in events if e[0] == "start"]
            passes = 2 if checkpointing is None else 3
            assert len(used) == passes * 10
            assert sum(not ready for *_, ready in used) <= 1, "every stack is on its way before it is asked for"
            assert len(started) <= 2 * 10, "forward and backward copy each stack once"


def test_backward_holds_no_copies(device):
    """Between the passes there are no more copies than are kept, however many layers there are."""
    _, offloaded = pair("", device, layers=5)
    offloaded.requires_grad_(False)
    embedded = offloaded.get_input_embeddings()(IDS.to(device)).detach().requires_grad_()
    loss = offloaded(inputs_embeds=embedded).logits.sum()
    size = stacks(offloaded)[0].qweight.numel()
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.dtype == torch.uint8 and o.numel() == size]
    assert len(alive) <= KEPT
    loss.backward()
    assert bool(embedded.grad.isfinite().all())


def test_stacks_stay_where_the_model_goes_elsewhere(device):
    model, offloaded = pair("qwen3-moe", device)
    ids = IDS.to(device)
    want = model(ids).logits
    before = [s.qweight.data_ptr() for s in stacks(offloaded)]
    offloaded.to(device)
    for dtype in (torch.bfloat16, torch.float32):
        assert all(s.to(dtype).dtype == s.weight.dtype == dtype for s in stacks(offloaded))
        assert [s.qweight.data_ptr() for s in stacks(offloaded)] == before
        assert all(s.device == s.weight.device == device for s in stacks(offloaded))
    torch.testing.assert_close(offloaded(ids).logits, want, rtol=1e-4, atol=1e-4)
    if device.type == "cuda":
        assert all(s.qweight.is_pinned() and s.scales.is_pinned() for s in stacks(offloaded))
        on_cpu = offloaded.cpu()
        assert all(s.device.type == "cpu" for s in stacks(on_cpu))
        torch.testing.assert_close(on_cpu(IDS).logits, want.cpu(), rtol=1e-3, atol=1e-3)


def test_meta_takes_the_values_away():
    _, offloaded = pair("qwen3-moe", torch.device("cpu"))
    offloaded.to("meta")
    assert all(s.qweight.is_meta for s in stacks(offloaded))
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj has no values"):
        offload(offloaded, Streamer(torch.device("cpu")))


def test_state_dicts_pickles_and_copies(device):
    model, offloaded = pair("qwen3-moe", device)
    ids = IDS.to(device)
    want = offloaded(ids).logits
    mine, its = offloaded.state_dict(), model.state_dict()
    assert set(mine) == set(its) and all(torch.equal(mine[n].cpu(), its[n].cpu()) for n in its)
    for again in (copy.deepcopy(offloaded), pickle.loads(pickle.dumps(offloaded))):
        assert len({id(s.streamer) for s in stacks(again)}) == 1
        assert stacks(again)[0].streamer is not stacks(offloaded)[0].streamer
        assert torch.equal(again(ids).logits, want)
    for stack in stacks(offloaded):
        stack.load_state_dict(ExpertWeights4bit.from_parameter(torch.randn(stack.weight_shape)).state_dict())
    assert (offloaded(ids).logits - want).norm() > 0.1 * want.norm(), "copies of before are not used"
    offloaded.load_state_dict(mine | its)
    assert torch.equal(offloaded(ids).logits, want)


def test_views_read_and_write(device):
    model, offloaded = pair("qwen3-moe", device)
    stack, same = stacks(offloaded)[0], stacks(model)[0]
    whole = same.dequantize()
    assert torch.equal(stack.dequantize(), whole) and torch.equal(stack[1] + 0, whole[1])
    assert torch.equal(stack.weight + 0, whole) and stack.weight.device == device
    for each in (stack, same):
        each.data *= 2
        with torch.no_grad():
            each[2].fill_(3.0)
        each.weight += 1
    assert torch.equal(stack.dequantize(), same.dequantize())
    assert torch.equal(stack.qweight.cpu(), same.qweight.cpu()) and stack.qweight.device.type == "cpu"


def test_shared_stacks_stay_shared():
    model = make("qwen3-moe")
    layers = model.model.layers
    layers[1].mlp.experts.down_proj = layers[0].mlp.experts.down_proj
    model = use_fourbit_experts(fourbit.quantize_model(model))
    offload(model, Streamer(torch.device("cpu"), always=True))
    first, second = (layer.mlp.experts.down_proj for layer in layers)
    assert first.qweight.data_ptr() == second.qweight.data_ptr() and first.scales is second.scales


def test_adapters(device):
    peft = pytest.importorskip("peft")
    model, offloaded = pair("gpt-oss", device)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], target_parameters=names)
    model, offloaded = peft.get_peft_model(model, config), peft.get_peft_model(offloaded, copy.deepcopy(config))
    tuned = {n: p for n, p in offloaded.named_parameters() if p.requires_grad}
    assert {p.device for p in tuned.values()} == {device} and len(tuned) == 12
    offloaded.load_state_dict({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, strict=False)
    ids = IDS.to(device)
    torch.testing.assert_close(offloaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    merged = offloaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, model.merge_and_unload()(ids).logits, rtol=1e-3, atol=1e-3)
    assert all(s.qweight.device.type == "cpu" for s in stacks(merged))


def test_what_cannot_be_pinned_is_copied_all_the_same(monkeypatch):
    """As where the system limits locked memory."""
    model = fourbit.quantize_model(make("qwen3-moe"))
    want = [s.qweight.clone() for s in stacks(model)]

    def refuse(*_):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda *_: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    with pytest.warns(RuntimeWarning, match=r"cannot be pinned.*: CUDA error: out of memory$"):
        offload(model, Streamer(torch.device("cuda", 0)))
    assert all(torch.equal(s.qweight, w) for s, w in zip(stacks(model), want, strict=True))


def test_autocast(device):
    model, offloaded = pair("gpt-oss", device)
    with torch.autocast(device.type, torch.bfloat16):
        for got, want in zip(gradients(offloaded, IDS.to(device)), gradients(model, IDS.to(device)), strict=True):
            assert got.dtype == want.dtype and (got - want).norm() < 0.02 * want.norm()


def test_generates(device):
    model, offloaded = pair("qwen3-moe", device)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ids = IDS[:1].to(device)
    assert torch.equal(offloaded.generate(ids, **settings), model.generate(ids, **settings))


def test_shapes_that_do_not_fit_are_refused():
    _, offloaded = pair("qwen3-moe", torch.device("cpu"))
    stack = stacks(offloaded)[0]
    with pytest.raises(ValueError, match="do not fit"):
        stack(torch.randn(9, 7), torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match="do not fit"):
        stack(torch.randn(9, 64), torch.zeros(3, dtype=torch.int32))


def test_on_the_cpu_nothing_is_done():
    model = fourbit.quantize_model(make("qwen3-moe"))
    assert offload_experts(model, "cpu") is model
    assert {type(s) for s in stacks(model)} == {ExpertWeights4bit}


@pytest.mark.long
def test_it_runs_under_torch_compile(device):
    _, offloaded = pair("qwen3-moe", device)
    with torch.no_grad():
        want = offloaded(IDS.to(device)).logits
        compiled = torch.compile(offloaded, backend="aot_eager")
        torch.testing.assert_close(compiled(IDS.to(device), use_cache=False).logits, want, rtol=1e-4, atol=1e-4)


def test_explain_and_warm_up_know_the_device(device):
    from fourbit_gpu.warmup import warmup

    _, offloaded = pair("qwen3-moe", device)
    stack = stacks(offloaded)[0]
    assert fourbit.explain(stack).query.device == device and warmup(stack, rows=(1, 8)) == 2


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")  # of what goes for loading alone
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_from_pretrained_keeps_stacks_in_host_memory(name, device, tmp_path, monkeypatch):
    """On the fly and from a 4-bit folder; what is saved is what a model in one place saves."""
    from fourbit_transformers import FourbitConfig, expert_offload

    monkeypatch.setattr(expert_offload, "gains", lambda device: True)
    moved = []
    apply = OffloadedExperts._apply
    monkeypatch.setattr(OffloadedExperts, "_apply", lambda s, fn, *a: moved.append(s.qweight) or apply(s, fn, *a))
    make(name).bfloat16().save_pretrained(tmp_path / "plain")
    load = transformers.AutoModelForCausalLM.from_pretrained
    here = load(tmp_path / "plain", quantization_config=FourbitConfig(blocksize=64), device_map=device)
    config = FourbitConfig(blocksize=64, offload_experts=True)
    model = load(tmp_path / "plain", quantization_config=config, device_map=device)
    model.save_pretrained(tmp_path / "small")
    again = load(tmp_path / "small", device_map=device, quantization_config=FourbitConfig(offload_experts=True))
    ids = IDS.to(device)
    for each in (model, again):
        assert all(type(s) is OffloadedExperts and s.qweight.device.type == "cpu" for s in stacks(each))
        assert len({id(s.streamer) for s in stacks(each)}) == 1
        assert [s.place for s in stacks(each)] == list(range(4))
        torch.testing.assert_close(each(ids).logits, here(ids).logits, rtol=1e-2, atol=1e-2)
        for mine, its in zip(stacks(each), stacks(here), strict=True):
            assert torch.equal(mine.qweight.cpu(), its.qweight.cpu())
    assert all(qweight.device.type != "cuda" for qweight in moved)
    assert "offload" not in (tmp_path / "small" / "config.json").read_text()
