"""What a product launches: its tensors' addresses, of this call and no other. With tensors on the CPU."""

from __future__ import annotations

import struct

import pytest
import torch

from fourbit.weight import Weight
from fourbit_cuda import linear, matmul, plan, route
from fourbit_gpu import pieces

N, K = 128, 256


def weight(nested=False, blocksize=64, skip=0):
    """Of any bits; its scales `skip` bytes from an aligned address."""
    blocks = N * K // blocksize
    size = blocks if nested else 4 * blocks
    absmax = torch.empty(size + 64, dtype=torch.uint8)
    absmax = absmax[-absmax.data_ptr() % 16 + skip :][:size]
    if nested:
        tables = (torch.empty(-(-blocks // 256)), torch.empty(256), torch.empty(1))
    else:
        absmax, tables = absmax.view(torch.float32), ()
    return Weight(torch.empty(N * K // 2, dtype=torch.uint8), absmax, torch.empty(16), blocksize, *tables)


def choose(monkeypatch, kind):
    """Make every product take one way."""
    made = {
        "few": plan.plan_linear,
        "many": lambda props, shape: matmul.plan_matmul(props, shape)[0],
        "pieces": lambda props, shape: None,
    }
    monkeypatch.setattr(route, "route", made[kind])


def addresses(w):
    nested = [part.data_ptr() for part in w[4:]] if w.nested else [0, 0, 0]
    return (w.absmax.data_ptr(), w.code.data_ptr(), *nested)


def map_facts(data):
    """`(address, columns, rows)`."""
    return struct.unpack("3Q", data[:24])


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("bias", (False, True))
def test_few_rows(made_up, monkeypatch, nested, bias):
    choose(monkeypatch, "few")
    made_up.sizes = (8,) * 16
    b = torch.empty(N, dtype=torch.bfloat16) if bias else None
    for w in (weight(nested), weight(nested)):
        for shape in ((3, K), (1, 3, K), (3, K), (K,)):
            x = torch.empty(shape, dtype=torch.bfloat16)
            out = linear.linear(made_up.launcher, x, w, N, b)
            assert out.shape == (*shape[:-1], N) and out.dtype == x.dtype and out.is_contiguous()
            _, parameters = made_up.launches.pop()
            want = (x.data_ptr(), w.packed.data_ptr(), *addresses(w), b.data_ptr() if bias else 0, out.data_ptr())
            assert parameters[:9] == want
            assert parameters[9:12] == (x.numel() // K, N, K) and parameters[14:] == (0, 0)
    assert not made_up.launches


def test_x_that_is_arranged_first(made_up, monkeypatch):
    choose(monkeypatch, "few")
    made_up.sizes = (8,) * 6
    w, x = weight(), torch.empty(40, K, dtype=torch.float16)
    for _ in range(2):
        out = linear.linear(made_up.launcher, x, w, N)
        (_, first), (_, second) = made_up.launches
        made_up.launches.clear()
        assert first[0] == x.data_ptr() and first[2:4] == (40, K)
        assert second[:2] == (first[1], w.packed.data_ptr())
        del out


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("transposed", (False, True))
def test_many_rows_at_ever_new_addresses(made_up, monkeypatch, nested, transposed):
    choose(monkeypatch, "many")
    made_up.sizes = (128, 128, *(8,) * 12)
    kept = []  # so that no address comes twice
    for w in (weight(nested), weight(nested), weight(nested)):
        for _ in range(3):
            x = torch.empty(40, N if transposed else K, dtype=torch.bfloat16)
            call = linear.linear_grad if transposed else linear.linear
            out = call(made_up.launcher, x, w, K if transposed else N)
            kept += [x, out]
            _, (of_x, of_weight, *parameters) = made_up.launches.pop()
            assert map_facts(of_x) == (x.data_ptr(), x.shape[1], 40)
            assert map_facts(of_weight) == (w.packed.data_ptr(), K // 2, N)
            assert tuple(parameters) == (*addresses(w), 0, out.data_ptr(), 40, N, K, 0, 0)


@pytest.mark.parametrize("kind", ("few", "many"))
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_experts(made_up, monkeypatch, kind, dtype):
    """The kernel is told how wide the offsets are, call by call."""
    choose(monkeypatch, kind)
    for wide in (dtype, torch.int32, torch.int64, dtype):
        made_up.sizes = (8,) * 16 if kind == "few" else (128, 128, *(8,) * 12)
        w, x, offsets = weight(), torch.empty(40, K, dtype=torch.bfloat16), torch.empty(1, dtype=wide)
        out = linear.grouped(made_up.launcher, x, offsets, w, N)
        _, parameters = made_up.launches.pop()
        assert parameters[7:9] == (offsets.data_ptr(), out.data_ptr())
        assert parameters[-2:] == (1, int(wide is torch.int64))


def test_what_is_not_aligned_goes_by_pieces(made_up, monkeypatch):
    """The scales only where they are copied 16 bytes at a time."""
    taken = []
    monkeypatch.setattr(pieces, "linear", lambda *args: taken.append("pieces"))
    monkeypatch.setattr(pieces, "linear_grad", lambda *args: taken.append("pieces"))
    odd = torch.empty(41 * K, dtype=torch.bfloat16)[1 : 40 * K + 1].view(40, K)
    even = torch.empty(40, K, dtype=torch.bfloat16)
    made_up.sizes = (8,) * 4

    def way(x, w):
        taken.clear()
        made_up.launches.clear()
        linear.linear(made_up.launcher, x, w, N)
        assert bool(taken) != bool(made_up.launches)
        return "pieces" if taken else "fused"

    for kind, with_odd_scales in (("few", "pieces"), ("many", "fused")):
        choose(monkeypatch, kind)
        linear._ready.clear()
        assert way(even, weight()) == "fused"
        assert way(odd, weight()) == "pieces"
        assert way(even, weight(skip=4)) == with_odd_scales
        assert way(even, weight()) == "fused"


def test_no_rows(made_up, monkeypatch):
    choose(monkeypatch, "few")
    out = linear.linear(made_up.launcher, torch.empty(2, 0, K, dtype=torch.bfloat16), weight(), N)
    assert out.shape == (2, 0, N) and not made_up.launches
    grad = linear.linear_grad(made_up.launcher, torch.empty(0, N, dtype=torch.bfloat16), weight(), K)
    assert grad.shape == (0, K) and not made_up.launches


def test_kept_ways_are_bounded(made_up, monkeypatch):
    choose(monkeypatch, "few")
    monkeypatch.setattr(linear, "_MOST_READY", 4)
    made_up.sizes, w = (8,) * 10, weight()
    for m in range(1, 16):
        linear.linear(made_up.launcher, torch.empty(m, K, dtype=torch.bfloat16), w, N)
        assert len(linear._ready) <= 4 and made_up.launches.pop()[1][9] == m


def test_memory_is_what_torch_empty_gives():
    """Of the function that allocates results, by its sibling for the CPU."""
    made = torch._C._dynamo.guards._empty_strided_cpu((2, 3, 4), (12, 4, 1), torch.bfloat16)
    want = torch.empty(2, 3, 4, dtype=torch.bfloat16)
    assert torch._C._dispatch_keys(made) == torch._C._dispatch_keys(want)
    assert (made.shape, made.stride(), made.dtype) == (want.shape, want.stride(), want.dtype)
    assert not made._is_view() and not made.requires_grad
    with torch.inference_mode():
        assert torch._C._dynamo.guards._empty_strided_cpu((2,), (1,), torch.bfloat16).is_inference()
