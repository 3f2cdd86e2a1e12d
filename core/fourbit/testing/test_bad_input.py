"""Bad input: a TypeError, ValueError or IndexError that names the op and the argument; never a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fourbit
from fourbit.testing.inputs import normal
from fourbit.testing.oracle import make_weight

COVERS = ()


@pytest.fixture
def good(device: torch.device) -> SimpleNamespace:
    """Arguments that work: a weight [20, 70], plain and double-quantized, and all that goes with it."""
    plain, double = make_weight(20, 70), make_weight(20, 70, double_quant=True)
    packed, absmax, code, blocksize = plain.args(device)
    return SimpleNamespace(
        **{"w": normal(20, 70).to(device), "x": normal(3, 70).to(device), "grad": normal(3, 20).to(device)},
        **{"bias": normal(20).to(device), "ids": torch.tensor([0, 3], device=device)},
        **{"packed": packed, "absmax": absmax, "code": code, "state": plain.state(device)},
        **{"double": double.state(device), "experts": make_weight(2, 10, 64), "device": device},
        weight=(packed, absmax, code, blocksize),
        nested=double.nested_args(device),
    )


def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    """On a device that no backend serves together with the real one."""
    return torch.empty_like(tensor, device="meta")


def with_weight(g: SimpleNamespace, **changes: object) -> tuple:
    """packed, absmax, code and blocksize with some of them changed."""
    named = dict(zip(("packed", "absmax", "code", "blocksize"), g.weight, strict=True)) | changes
    return tuple(named.values())


ops = torch.ops.fourbit
Call = Callable[[SimpleNamespace], object]

QUANTIZE: dict[str, tuple[Call, str]] = {
    "empty": (lambda g: fourbit.quantize_4bit(g.w[:0]), "w is empty"),
    "0-d": (lambda g: fourbit.quantize_4bit(g.w[0, 0]), "w has no dimensions"),
    "int64": (lambda g: fourbit.quantize_4bit(g.w.long()), "w must be float32.* got torch.int64"),
    "uint8": (lambda g: fourbit.quantize_4bit(g.w.byte()), "w must be float32.* got torch.uint8"),
    "bool": (lambda g: fourbit.quantize_4bit(g.w > 0), "w must be float32.* got torch.bool"),
    "complex": (lambda g: fourbit.quantize_4bit(g.w + 0j), "w must be float32.* got torch.complex64"),
    "a list": (lambda g: fourbit.quantize_4bit([1.0, 2.0]), "w must be a tensor, got list"),
    "None": (lambda g: fourbit.quantize_4bit(None), "w must be a tensor, got NoneType"),
    "unknown type": (lambda g: fourbit.quantize_4bit(g.w, quant_type="nf5"), "quant_type 'nf5'.*nf4"),
    "type not text": (lambda g: fourbit.quantize_4bit(g.w, quant_type=4), "quant_type must be a string"),
    **{
        f"blocksize {size!r}": (lambda g, size=size: fourbit.quantize_4bit(g.w, blocksize=size), "blocksize must be")
        for size in (0, -64, 1, 16, 48, 63, 100, 8192, 2**40, 64.0, "64", True)
    },
    "code of 15": (lambda g: ops.quantize_4bit(g.w, g.code[:15], 64), r"code must be float32 \[16\]"),
    "code in float64": (lambda g: ops.quantize_4bit(g.w, g.code.double(), 64), r"code must be float32 \[16\]"),
    "code elsewhere": (lambda g: ops.quantize_4bit(g.w, elsewhere(g.code), 64), "code is on meta"),
    "8-bit empty": (lambda g: fourbit.quantize_blockwise(g.w[:0]), "x is empty"),
    "8-bit int": (lambda g: fourbit.quantize_blockwise(g.w.int()), "x must be float32"),
    "8-bit blocksize": (lambda g: fourbit.quantize_blockwise(g.w, blocksize=100), "blocksize must be"),
    "8-bit code": (lambda g: fourbit.quantize_blockwise(g.w, code=g.code), r"code must be float32 \[256\]"),
}

DEQUANTIZE: dict[str, tuple[Call, str]] = {
    "packed too short": (lambda g: fourbit.dequantize_4bit(g.packed[:-1], g.state), "packed must be uint8 with 700"),
    "packed too long": (lambda g: fourbit.dequantize_4bit(g.packed.repeat(2, 1), g.state), "packed must be uint8"),
    "packed int8": (lambda g: fourbit.dequantize_4bit(g.packed.view(torch.int8), g.state), "packed must be uint8"),
    "packed float": (lambda g: fourbit.dequantize_4bit(g.packed.float(), g.state), "packed must be uint8"),
    "packed a list": (lambda g: fourbit.dequantize_4bit([1], g.state), "packed must be a tensor"),
    "state None": (lambda g: fourbit.dequantize_4bit(g.packed, None), "state must be a fourbit.QuantState"),
    "to int32": (lambda g: fourbit.dequantize_4bit(g.packed, g.state, torch.int32), "dtype must be float32"),
    "to float64": (lambda g: fourbit.dequantize_4bit(g.packed, g.state, torch.float64), "dtype must be float32"),
    "scales elsewhere": (
        lambda g: ops.dequantize_4bit(*with_weight(g, absmax=elsewhere(g.absmax)), [20, 70], torch.float32),
        "absmax is on meta",
    ),
    "packed elsewhere": (
        lambda g: ops.linear_4bit(g.x, *with_weight(g, packed=elsewhere(g.packed)), 20),
        "packed is on meta",
    ),
    "too few scales": (lambda g: replace(g.state, absmax=g.absmax[:-1]), "absmax must be float32 with 22"),
    "scales float16": (lambda g: replace(g.state, absmax=g.absmax.half()), "absmax must be float32"),
    "scales uint8 alone": (lambda g: replace(g.state, absmax=g.double.absmax), "absmax must be float32"),
    "scales float nested": (lambda g: replace(g.double, absmax=g.absmax), "absmax must be uint8"),
    "nested scales missing": (lambda g: replace(g.double, nested_code=None), "nested_absmax is given without"),
    "nested scales alone": (lambda g: replace(g.state, nested_code=g.double.nested_code), "without nested_absmax"),
    "nested scales too many": (
        lambda g: replace(g.double, nested_absmax=torch.ones(2, device=g.device)),
        "nested_absmax must be float32 with 1",
    ),
    "nested code short": (lambda g: replace(g.double, nested_code=g.code), "nested_code must be float32 with 256"),
    "state's code": (lambda g: replace(g.state, code=g.code.half()), r"code must be float32 \[16\]"),
    "state's blocksize": (lambda g: replace(g.state, blocksize=60), "blocksize must be"),
    "state's other blocksize": (lambda g: replace(g.state, blocksize=32), "absmax must be float32 with 44"),
    "state's shape": (lambda g: replace(g.state, shape=(20, 64)), "absmax must be float32 with 20"),
    "state's empty shape": (lambda g: replace(g.state, shape=(20, 0)), "shape .* has no elements"),
    "state's dtype": (lambda g: replace(g.state, dtype=torch.int8), "dtype must be float32"),
    "blocksize of the op": (
        lambda g: ops.dequantize_4bit(*with_weight(g, blocksize=65), [20, 70], torch.float32),
        "blocksize must be",
    ),
    "8-bit codes int32": (
        lambda g: fourbit.dequantize_blockwise(g.packed.int(), g.absmax[:3]),
        "codes must be uint8",
    ),
    "8-bit scales": (lambda g: fourbit.dequantize_blockwise(g.packed, g.absmax), "absmax must be float32 with 3"),
}

PRODUCTS: dict[str, tuple[Call, str]] = {
    "features": (lambda g: fourbit.linear_4bit(g.x[:, :-1], g.packed, g.state), r"x has shape \[3, 69\]"),
    "0-d x": (lambda g: fourbit.linear_4bit(g.x[0, 0], g.packed, g.state), "x has shape"),
    "int x": (lambda g: fourbit.linear_4bit(g.x.int(), g.packed, g.state), "x must be float32"),
    "float64 x": (lambda g: fourbit.linear_4bit(g.x.double(), g.packed, g.state), "x must be float32"),
    "x elsewhere": (lambda g: ops.linear_4bit(g.x, *with_weight(g, code=elsewhere(g.code)), 20), "code is on meta"),
    "3-D weight": (
        lambda g: fourbit.linear_4bit(g.x, g.packed, replace(g.state, shape=(2, 10, 70))),
        "weight must be 2-D",
    ),
    "packed too short": (lambda g: fourbit.linear_4bit(g.x, g.packed[1:], g.state), "packed must be uint8"),
    "bias too short": (
        lambda g: fourbit.linear_4bit(g.x, g.packed, g.state, g.bias[1:]),
        r"bias must have shape \[20\]",
    ),
    "bias 2-D": (lambda g: fourbit.linear_4bit(g.x, g.packed, g.state, g.bias[None]), r"bias must have shape \[20\]"),
    "bias dtype": (lambda g: fourbit.linear_4bit(g.x, g.packed, g.state, g.bias.half()), "bias is torch.float16"),
    "bias elsewhere": (
        lambda g: fourbit.linear_4bit(g.x.detach(), g.packed, g.state, elsewhere(g.bias)),
        "bias is on meta",
    ),
    "out_features": (lambda g: ops.linear_4bit(g.x, *g.weight, 21), "packed must be uint8 with 735"),
    "scales dtype": (lambda g: ops.linear_4bit(g.x, *with_weight(g, absmax=g.absmax.double()), 20), "absmax must be"),
    "gradient features": (lambda g: ops.linear_4bit_grad(g.grad[:, 1:], *g.weight, 70), "packed must be uint8"),
    "gradient int": (lambda g: ops.linear_4bit_grad(g.grad.long(), *g.weight, 70), "grad must be float32"),
    "ids float": (lambda g: fourbit.embedding_4bit(g.ids.float(), g.packed, g.state), "ids must be int32 or int64"),
    "ids bool": (lambda g: fourbit.embedding_4bit(g.ids > 0, g.packed, g.state), "ids must be int32 or int64"),
    "ids a list": (lambda g: fourbit.embedding_4bit([1], g.packed, g.state), "ids must be a tensor"),
    "embedding 1-D": (
        lambda g: fourbit.embedding_4bit(g.ids, g.packed, replace(g.state, shape=(1400,))),
        "weight must be 2-D",
    ),
    "embedding packed": (lambda g: fourbit.embedding_4bit(g.ids, g.packed[1:], g.state), "packed must be uint8"),
    "embedding dtype": (lambda g: fourbit.embedding_4bit(g.ids, g.packed, g.state, torch.int8), "dtype must be"),
    "experts 2-D": (
        lambda g: fourbit.grouped_linear_4bit(g.x, g.ids, g.packed, g.state),
        "do not fit the weight",
    ),
    "experts and offsets": (
        lambda g: ops.grouped_linear_4bit(g.x, g.ids.float(), *g.weight, 10),
        "offsets must be int32 or int64",
    ),
    "experts and rows": (
        lambda g: ops.grouped_linear_4bit(g.x[None], g.ids, *g.weight, 10),
        "rows must be 2-D",
    ),
}

CASES = {
    f"{kind}: {name}": case
    for kind, cases in (("quantize", QUANTIZE), ("dequantize", DEQUANTIZE), ("product", PRODUCTS))
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_error_names_what_is_wrong(need, good, name):
    for op in ("quantize_4bit", "dequantize_4bit", "linear_4bit", "embedding_4bit"):
        need(op)
    call, message = CASES[name]
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        call(good)


def test_bad_input_leaves_nothing_behind(need, good):
    """After an error the same op gives the same bits as before."""
    need("linear_4bit")
    before = fourbit.linear_4bit(good.x, good.packed, good.state)
    for call, _ in PRODUCTS.values():
        with pytest.raises((TypeError, ValueError, IndexError)):
            call(good)
    assert torch.equal(before, fourbit.linear_4bit(good.x, good.packed, good.state))
