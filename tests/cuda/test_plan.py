"""Launch plans of the GPU products: every shape gets one that the device can hold, on made-up devices of many kinds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fourbit_cuda import plan
from fourbit_cuda.tile import Shape
from fourbit_gpu.device import DeviceProps
from fourbit_gpu.pieces import piece_columns

KB = 1 << 10


def device(arch: int, sm_count: int, shared: int, l2: int = 40 << 20, bandwidth: float = 2000.0) -> DeviceProps:
    return DeviceProps(
        index=0,
        name=f"sm_{arch}",
        arch=arch,
        sm_count=sm_count,
        l2_bytes=l2,
        shared_per_block=shared,
        warp_size=32,
        bandwidth=bandwidth,
    )


DEVICES = [
    device(80, 108, 163 * KB),
    device(86, 82, 99 * KB, 6 << 20, 936.0),
    device(89, 128, 99 * KB, 72 << 20, 1008.0),
    device(90, 132, 227 * KB, 50 << 20, 3350.0),
    device(90, 78, 227 * KB, 25 << 20, 0.0),
    device(100, 148, 227 * KB, 120 << 20, 8000.0),
    device(120, 170, 99 * KB, 96 << 20, 1792.0),
]
every_device = pytest.mark.parametrize("props", DEVICES, ids=lambda props: f"{props.name}x{props.sm_count}")

SHAPES = [(64, 64), (1, 256), (17, 192), (4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672), (151936, 896)]


def shape(m: int, n: int, k: int, **change: object) -> Shape:
    return replace(Shape(m, n, k, 1, 64, False), **change)


def covered(chosen: plan.Plan, n: int, split: int) -> bool:
    """Whether the blocks' ranges cover all rows of the weight, none of them twice, and none is without rows."""
    owners = chosen.grid[0] // split
    return chosen.grid[0] % split == 0 and (owners - 1) * chosen.range_rows < n <= owners * chosen.range_rows


@every_device
@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("nested", (False, True), ids=("plain", "double"))
def test_every_shape_has_a_plan_that_fits(props, size, nested):
    for m in (1, 2, 5, 8, 9, 16, 33, 64, 100, 128):
        chosen = plan.plan_linear(props, shape(m, *size, nested=nested))
        assert chosen is not None
        defines = dict(chosen.spec.defines)
        assert chosen.shared_bytes <= props.shared_per_block
        assert chosen.threads == 32 * defines["WR"] * defines["WK"] <= 1024
        assert covered(chosen, size[0], defines["SPLIT"])
        assert 0 < chosen.pass_rows <= 16 * defines["RT"] * defines["WR"]
        assert chosen.pass_rows % 16 == chosen.range_rows % 16 == 0
        assert chosen.grid[1] * 8 * defines["NT"] >= m
        assert defines["EVEN"] == (size[1] % defines["KW"] == 0)
        assert defines["SPLIT"] <= -(-size[1] // (defines["WK"] * defines["KW"])), "a block of a cluster has no work"


@every_device
@pytest.mark.parametrize("k", (4096, 320), ids=("even", "ragged"))
@pytest.mark.parametrize("nested", (False, True), ids=("plain", "double"))
def test_shared_memory_is_laid_out_in_order(props, k, nested):
    """Each part begins where the one before has ended, at an address that its copies can have."""
    for m in (1, 16, 64):
        chosen = plan.plan_linear(props, shape(m, 4096, k, nested=nested))
        d = dict(chosen.spec.defines)
        warps, rows = d["WR"] * d["WK"], 16 * d["RT"]
        slots = max(d["STAGES"] - d["INSIDE"], 0)
        ends = {
            "RING_OFFSET": 256 * d["ENTRY_BYTES"],
            "SIDES_OFFSET": d["RING_OFFSET"] + slots * warps * rows * d["KW"] // 2,
            "CODES_OFFSET": d["SIDES_OFFSET"] + d["STAGES"] * warps * d["SIDE_BYTES"],
            "BARRIERS_OFFSET": d["CODES_OFFSET"] + 1024 * nested,
            "X_OFFSET": d["BARRIERS_OFFSET"] + 2 * 8 * d["STAGES"],
        }
        for name, end in ends.items():
            assert end <= d[name] and d[name] % 16 == 0, name
        sums = d["WK"] * 8 * d["NT"] * d["SUM_STRIDE"] * 4
        assert d["X_OFFSET"] + sums <= chosen.shared_bytes


@every_device
def test_instructions_are_those_of_the_device(props):
    """No wgmma but on the one arch that has it, no clusters before sm_90, no wide table where there is no room."""
    for m in (1, 16, 64):
        chosen = plan.plan_linear(props, shape(m, 8192, 8192))
        defines = dict(chosen.spec.defines)
        assert defines["WGMMA"] == 0 or props.arch == 90
        assert chosen.spec.arch_specific == bool(defines["WGMMA"])
        assert (chosen.arrange is not None) == bool(defines["WGMMA"])
        assert defines["SPLIT"] == 1 or props.arch >= 90
        assert defines["WIDE"] == (props.shared_per_block >= plan.WIDE_BYTES)


@every_device
def test_large_weights_keep_the_whole_device_busy(props):
    """The most loaded block has at most a fifth more than an equal share, and no block waits for another to end."""
    for n, k in ((8192, 8192), (28672, 8192), (14336, 4096)):
        for m in (1, 8, 64):
            chosen = plan.plan_linear(props, shape(m, n, k))
            assert chosen.grid[0] <= props.sm_count
            split = dict(chosen.spec.defines)["SPLIT"]
            assert chosen.range_rows / split <= 1.2 * n / props.sm_count + 16


def test_plans_follow_the_device_not_one_card():
    """The same shape gets other grids on devices with other numbers of multiprocessors."""
    grids = {plan.plan_linear(props, shape(1, 28672, 8192)).grid for props in DEVICES}
    assert len(grids) >= 5


@pytest.mark.parametrize(
    "change", ({"dtype": 0}, {"k": 100}, {"k": 192, "blocksize": 128}), ids=("float32", "ragged k", "straddling blocks")
)
def test_shapes_that_the_fused_kernel_cannot_take(change):
    assert plan.plan_linear(DEVICES[3], replace(shape(1, 256, 256), **change)) is None


def test_turing_has_no_fused_kernel():
    assert plan.plan_linear(device(75, 72, 64 * KB), shape(1, 4096, 4096)) is None


@every_device
@pytest.mark.parametrize("blocksize", (32, 64, 128, 256, 512, 1024, 2048, 4096))
def test_every_blocksize(props, blocksize):
    for m in (1, 16, 64):
        assert plan.plan_linear(props, shape(m, 4096, 4096, blocksize=blocksize, nested=True)) is not None


@every_device
def test_experts_share_the_device(props):
    """With few rows in all, the experts that have any should together fill the device; others get no blocks."""
    for rows, busy in ((8, 8), (64, 64), (300, 64)):
        chosen = plan.plan_linear(props, shape(rows, 14336, 4096, experts=64))
        assert chosen.grid[1] == busy and chosen.arrange is None
        assert chosen.grid[0] * busy >= props.sm_count // 2


@every_device
def test_pieces(props):
    """Pieces cover the columns, never hold all of a large weight if they must not, and fill the device with work."""
    for m in (1, 512, 4096):
        for columns, inner in ((8192, 8192), (28672, 8192), (33, 65), (4096, 14336)):
            for whole in (False, True):
                width = piece_columns(props, m, columns, inner, 2, whole=whole)
                assert 0 < width <= columns
                if not whole and columns * inner * 2 > 4 * props.l2_bytes:
                    assert width <= columns // 2 + 128
    assert piece_columns(props, 4096, 28672, 8192, 2, whole=True) < 28672
    # the whole weight where x and the result are larger than it
    assert piece_columns(props, 4096, 8192, 8192, 2, whole=True) == 8192


def test_text_says_what_was_chosen():
    text = plan.plan_linear(DEVICES[3], shape(64, 8192, 8192)).text
    for word in ("wgmma", "blocks", "132 multiprocessors", "K split over", "rows of x"):
        assert word in text
