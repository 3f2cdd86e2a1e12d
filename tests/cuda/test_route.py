"""Which of the three ways a product takes, on made-up devices; and that what is launched fits them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fourbit_cuda import matmul, plan, route
from fourbit_cuda.tile import Shape
from tests.cuda.test_plan import DEVICES, KB, device, every_device

H100 = device(90, 132, 227 * KB, 50 << 20, 3352.0)
SHAPE = Shape(512, 8192, 8192, 1, 64, False)
SIZES = [(8192, 8192), (1024, 4096), (4304, 1152), (200, 64), (28672, 8192), (136, 320)]
ROWS = (1, 2, 16, 17, 33, 64, 65, 128, 129, 300, 512, 1000, 4096, 100_000)


@every_device
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_only_sm_90_has_a_kernel_for_many_rows(props, size):
    n, k = size
    for m in ROWS:
        for transposed in (False, True):
            chosen = route.route(props, Shape(m, n, k, 1, 64, False, transposed=transposed))
            if props.arch == matmul.ARCH:
                assert chosen is None or m > 128 or isinstance(chosen, matmul.Plan | plan.Plan)
            elif transposed or m > route.FEW_ROWS:
                assert chosen is None
            else:
                assert isinstance(chosen, plan.Plan)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("props", [each for each in DEVICES if each.arch == 90], ids=lambda props: str(props.sm_count))
def test_what_is_launched_fits_the_device(props, size):
    n, k = size
    for m in ROWS:
        for change in (
            {},
            {"transposed": True},
            {"nested": True},
            {"experts": 60},
            {"experts": 60, "transposed": True},
        ):
            shape = replace(SHAPE, m=m, n=n, k=k, **change)
            for b in matmul.candidates(props, shape):
                chosen = matmul.make_plan(props, shape, b)
                assert chosen.shared_bytes <= props.shared_per_block
                assert 0 < chosen.grid[0] <= props.sm_count and chosen.grid[0] % b.split == 0
                inner = n if shape.transposed else k
                assert b.split * 2 * matmul.STEP <= inner + 2 * matmul.STEP - 1  # a pair of steps for each


@pytest.mark.parametrize("kind", matmul.BLOCKS, ids=lambda b: f"{b.columns}-{b.split}-{b.decoders}{'b' * b.bytewise}")
def test_registers_add_up(kind):
    """setmaxnreg only moves what was allocated for all threads at the launch; wgmma has 154 for 256 columns."""
    at_launch = 65536 // kind.threads // 8 * 8
    decode, product = kind.registers
    assert 128 * (max(kind.decoders, 1) * decode + 2 * product) <= at_launch * kind.threads
    assert decode % 8 == product % 8 == 0
    assert at_launch >= kind.columns // 2 + 26
    assert kind.decoders <= kind.stages  # or the turns of a group of decoders would pass barriers by


def test_more_rows_never_go_back_to_the_kernel_for_few():
    for n, k in SIZES:
        ways = [type(route.route(H100, replace(SHAPE, m=m, n=n, k=k))) for m in range(1, 300)]
        assert plan.Plan not in ways[129:]
        assert sum(a is plan.Plan and b is not plan.Plan for a, b in zip(ways, ways[1:], strict=False)) <= 1


def test_float32_and_odd_blocks_take_pieces():
    assert route.route(H100, replace(SHAPE, dtype=0)) is None
    assert route.route(H100, replace(SHAPE, k=8256, blocksize=128)) is None
    assert route.route(H100, replace(SHAPE, n=8191, transposed=True)) is None  # rows of the gradient at odd addresses
    assert matmul.plan_matmul(H100, replace(SHAPE, n=8191)) is not None


@pytest.mark.parametrize("experts", (0, 64))
@pytest.mark.parametrize("transposed", (False, True))
def test_description_names_every_number_of_rows_once(experts, transposed):
    for n, k in SIZES:
        shape = replace(SHAPE, n=n, k=k, experts=experts, transposed=transposed)
        parts = route.describe(H100, shape).split("; ")
        ends = []
        for part in parts[:-1]:
            first, last = part.split(" rows of x: ")[0].split(" to ")
            ends.append((int(first), int(last)))
        last = int(parts[-1].removeprefix("from ").split(" on ")[0])
        assert [first for first, _ in ends] + [last] == [1, *(end + 1 for _, end in ends)]
        for first, end in ends:
            for m in (first, end):
                assert type(route.route(H100, replace(shape, m=m))) is type(route.route(H100, replace(shape, m=first)))


def test_estimates_are_those_of_an_h100():
    """Microseconds of the parts that the routes compare, where they were measured: within a third."""
    measured = {(512, 8192, 8192): 147.7, (4096, 8192, 8192): 762.7, (128, 1024, 4096): 12.7, (512, 4304, 1152): 15.6}
    for (m, n, k), microseconds in measured.items():
        found = route.pieces_microseconds(H100, replace(SHAPE, m=m, n=n, k=k))
        assert microseconds / 1.33 < found < microseconds * 1.33, (m, n, k, found)
    few = {(64, 8192, 8192): 36.6, (64, 1024, 4096): 16.3, (128, 28672, 8192): 175.7, (128, 6144, 6144): 52.9}
    for (m, n, k), microseconds in few.items():
        chosen = plan.plan_linear(H100, replace(SHAPE, m=m, n=n, k=k))
        assert microseconds / 1.33 < chosen.microseconds < microseconds * 1.33, (m, n, k, chosen.microseconds)
