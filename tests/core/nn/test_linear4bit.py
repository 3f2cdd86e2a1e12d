"""Linear4bit: what it computes, and what its bits survive."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

import fourbit
from fourbit.nn import Linear4bit
from fourbit.testing.oracle import assert_product

SHAPES = [(64, 96), (33, 50), (7, 31), (1, 1), (128, 64)]  # [out, in]; the second and third are ragged
STORAGE = ("qweight", "scales", "codebook", "nested_scales", "nested_codebook", "nested_offset")


def make(out=64, cols=96, *, bias=True, **config):
    torch.manual_seed(out * 1000 + cols)
    linear = nn.Linear(cols, out, bias=bias)
    return linear, Linear4bit.from_linear(linear, fourbit.QuantConfig(**config))


def bits(module):
    return {name: getattr(module, name).clone() for name in STORAGE if hasattr(module, name)}


def same_bits(a, b):
    one, two = bits(a), bits(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_linear_with_the_dequantized_weight(shape, double_quant, bias):
    linear, module = make(*shape, bias=bias, double_quant=double_quant)
    x = torch.randn(2, 3, shape[1])
    want = functional.linear(x, module.dequantize(), linear.bias)
    torch.testing.assert_close(module(x), want)
    assert module.dequantize().shape == shape
    packed, state = module.quant_state()
    assert torch.equal(fourbit.dequantize_4bit(packed, state), module.dequantize())


def test_holds_the_bits_of_quantize_4bit():
    linear, module = make(double_quant=True)
    packed, state = fourbit.quantize_4bit(linear.weight, double_quant=True)
    mine, my_state = module.quant_state()
    assert torch.equal(mine.flatten(), packed.flatten())
    assert torch.equal(my_state.absmax, state.absmax)
    assert torch.equal(my_state.nested_absmax, state.nested_absmax)
    assert float(my_state.nested_offset) == float(state.nested_offset)


@pytest.mark.parametrize("compute_dtype", [None, "bfloat16", torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compute_dtype_is_of_the_product_and_the_result_has_the_inputs(compute_dtype, dtype):
    linear, module = make(compute_dtype=compute_dtype)
    x = torch.randn(4, 96).to(dtype)
    compute = module.compute_dtype or dtype
    result = module(x)
    assert result.dtype == dtype
    worst = max(compute, dtype, key=lambda one: torch.finfo(one).eps)
    assert_product(result.to(worst), x.to(compute), module.dequantize().T, worst, linear.bias.to(compute))


def test_a_new_module_gives_nan_not_a_plausible_number():
    for double_quant in (False, True):
        assert Linear4bit(64, 8, double_quant=double_quant)(torch.ones(1, 64)).isnan().all()


def test_gradient_goes_to_the_input_and_the_bias_and_the_weight_is_frozen():
    linear, module = make()
    x = torch.randn(5, 96, requires_grad=True)
    module(x).square().sum().backward()
    grad, bias_grad = x.grad, module.bias.grad
    x.grad = module.bias.grad = None
    functional.linear(x, module.dequantize(), module.bias).square().sum().backward()
    torch.testing.assert_close(grad, x.grad)
    torch.testing.assert_close(bias_grad, module.bias.grad)
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["bias"]


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: _through_torch_save(m),
    "half": lambda m: copy.deepcopy(m).half(),
    "bfloat16": lambda m: copy.deepcopy(m).bfloat16(),
    "float": lambda m: copy.deepcopy(m).half().float(),
    "double": lambda m: copy.deepcopy(m).double(),
    "to dtype": lambda m: copy.deepcopy(m).to(torch.bfloat16),
    "to device": lambda m: copy.deepcopy(m).to("cpu", torch.float16),
    "type": lambda m: copy.deepcopy(m).type(torch.float16),
    "share_memory": lambda m: copy.deepcopy(m).share_memory(),
    "share_memory_": lambda m: _share_each(copy.deepcopy(m)),
    "eval/train": lambda m: copy.deepcopy(m).eval().train(),
    "requires_grad_": lambda m: copy.deepcopy(m).requires_grad_(False),
}


def _through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _share_each(module):
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.share_memory_()
    return module


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_bits_survive(how, double_quant):
    _, module = make(double_quant=double_quant)
    copied = COPIES[how](module)
    assert same_bits(copied, module)
    assert copied.dequantize(torch.float32).equal(module.dequantize(torch.float32))


def test_a_cast_changes_the_logical_dtype():
    _, module = make()
    assert module.weight.dtype == torch.float32
    module.half()
    assert module.weight.dtype == module.bias.dtype == torch.float16
    assert module(torch.randn(1, 96).half()).dtype == torch.float16
    assert module.float().weight.dtype == torch.float32


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_is_symmetric(double_quant, assign):
    _, module = make(double_quant=double_quant)
    other = Linear4bit(96, 64, double_quant=double_quant)
    result = other.load_state_dict(module.state_dict(), strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert same_bits(other, module)


def test_a_meta_module_is_filled_by_assignment():
    _, module = make(double_quant=True)
    other = Linear4bit(96, 64, double_quant=True, device="meta")
    other.load_state_dict(module.state_dict(), assign=True)
    x = torch.randn(2, 96)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("double_quant", [False, True])
def test_half_a_state_dict_is_refused_and_changes_nothing(strict, double_quant):
    _, module = make(double_quant=double_quant)
    state = {k: torch.zeros_like(v) for k, v in module.state_dict().items()}
    state["codebook"] = module.codebook.clone()
    for name in [n for n in state if n != "bias"]:
        partial = {k: v for k, v in state.items() if k != name}
        before = bits(module)
        with pytest.raises(RuntimeError, match=f"{name} is missing"):
            module.load_state_dict(partial, strict=strict)
        assert all(torch.equal(v, before[k]) for k, v in bits(module).items())


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_of_another_quantization_is_refused(strict):
    _, module = make()
    for other, message in [
        (make(double_quant=True)[1], "double quantization"),
        (make(blocksize=32)[1], "blocksize"),
        (make(quant_type="fp4")[1], "not those of 'nf4'"),
        (make(64, 128)[1], "shape"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            module.load_state_dict(other.state_dict(), strict=strict)


def test_strict_loading_names_what_is_missing_and_what_is_extra():
    _, module = make()
    state = module.state_dict()
    with pytest.raises(RuntimeError, match="Missing key.*bias"):
        module.load_state_dict({k: v for k, v in state.items() if k != "bias"})
    with pytest.raises(RuntimeError, match="Unexpected key.*stranger"):
        module.load_state_dict({**state, "stranger": torch.zeros(1)})


def test_nothing_found_leaves_the_weight_as_it_was():
    _, module = make()
    before = bits(module)
    module.load_state_dict({}, strict=False)
    assert all(torch.equal(v, before[k]) for k, v in bits(module).items())


@pytest.mark.parametrize("double_quant", [False, True])
def test_compiles_whole_and_follows_a_new_weight(double_quant):
    torch._dynamo.reset()
    _, module = make(double_quant=double_quant)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 96)
    torch.testing.assert_close(compiled(x), module(x))
    module.store(torch.randn(64, 96))
    torch.testing.assert_close(compiled(x), module(x))
    module.load_state_dict(make(double_quant=double_quant)[1].state_dict(), assign=True)
    torch.testing.assert_close(compiled(x), module(x))


def test_wrong_arguments_are_named():
    _, module = make()
    with pytest.raises(ValueError, match=r"want \[..., 96\]"):
        module(torch.randn(2, 95))
    with pytest.raises(TypeError, match="float64"):
        module(torch.randn(2, 96, dtype=torch.float64))
    with pytest.raises(ValueError, match="power of two"):
        Linear4bit(64, 64, blocksize=48)
    with pytest.raises(ValueError, match="unknown quant_type 'nf5'"):
        Linear4bit(64, 64, quant_type="nf5")
    with pytest.raises(ValueError, match="no elements"):
        Linear4bit(0, 64)
    with pytest.raises(ValueError, match="compute_dtype"):
        Linear4bit(64, 64, compute_dtype="int8")
    linear = nn.Linear(64, 64)
    linear.weight.data[3, 5] = torch.nan
    with pytest.raises(fourbit.NonFiniteError, match=r"layer\.weight.*\[3, 5\]"):
        Linear4bit.from_linear(linear, name="layer.weight")
    with pytest.raises(ValueError, match="packed weight is"):
        module.load_packed(*fourbit.quantize_4bit(torch.randn(8, 8)))


def test_repr_says_how_it_is_quantized():
    assert repr(make(double_quant=True)[1]) == (
        "Linear4bit(in_features=96, out_features=64, bias=True, 64×96, nf4, blocksize=64, double_quant,"
        " compute_dtype=input's)"
    )
