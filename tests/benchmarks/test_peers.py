"""The benchmarks' own logic: targets and verdicts, the interleaving, the command line. No time is asserted."""

import pytest


@pytest.fixture(scope="module")
def targets(load):
    return load("peers.targets")


@pytest.fixture(scope="module")
def timing(load):
    return load("harness.timing")


@pytest.mark.parametrize(
    ("value", "verdict"), [(8.0, "aim met"), (7.99, "met"), (6.5, "met"), (6.49, "MISSED"), (float("nan"), "MISSED")]
)
def test_a_ratio_is_judged(targets, value, verdict):
    assert targets.Target(targets.TORCH16, 6.5, 8).verdict(value) == verdict


@pytest.mark.parametrize(
    ("value", "verdict"), [(5.9, "aim met"), (6.1, "met"), (8.1, "MISSED"), (float("nan"), "MISSED")]
)
def test_of_microseconds_less_is_better(targets, value, verdict):
    (target,) = targets.MODULE
    assert target.verdict(value) == verdict


def test_without_an_aim_there_is_only_met(targets):
    assert targets.NEVER_SLOWER.verdict(100.0) == "met"
    assert targets.DISTURBED.verdict(0.5) == "met"
    assert targets.DISTURBED.verdict(2.6) == "MISSED"


def test_descriptions(targets):
    assert targets.Target(targets.READ, 0.8, 0.9).describe() == "≥ 80%, aim 90%"
    assert targets.Target(targets.TORCH16, 6.5, 8).describe() == "≥ 6.5, aim 8"
    assert targets.DISTURBED.describe() == "≤ 2.5"


def test_targets_by_dtype_rows_and_instruction_set(targets):
    assert {t.measure for t in targets.linear("bf16", 1)} == {targets.READ, targets.TORCH16, targets.BNB}
    assert {t.measure for t in targets.linear("fp32", 512)} == {targets.TORCH32}
    assert targets.linear("bf16", 3) == ()
    assert [t.least for t in targets.linear("bf16", 1, "avx2")] == [2.5]
    assert targets.linear("bf16", 1, "scalar") == ()
    for (dtype, _), wanted in targets.LINEAR.items():
        assert wanted
        for target in wanted:
            assert target.measure in (targets.READ, targets.BNB, f"torch {dtype}")
            assert target.aim is None or target.aim > target.least


def test_copies_pass_more_than_the_cache(timing):
    for size in (1, 4096, 9 << 20, 255 << 20, 256 << 20, 1 << 30):
        assert size * timing.copies_for(size) > timing.COLD_BYTES


def test_times(timing):
    times = timing.Times.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (times.median, times.p10, times.p90, times.least, times.mean, times.count) == (3, 1, 5, 1, 3, 5)
    assert timing.Times.of([2.0]).p90 == 2


def test_contenders_take_turns_and_rotate_their_copies(timing):
    used = {"a": [], "b": []}

    def calls(name):
        return [lambda i=i: used[name].append(i) for i in range(3)]

    found = timing.interleave({name: calls(name) for name in used}, 0.0, rounds=(4, 4), burst=3)
    for name, order in used.items():
        assert order == [i % 3 for i in range(len(order))]
        assert len(order) == 2 + 4 * 3
        assert found[name].count == 4 * 2  # the first of each burst is not counted


def test_rows_give_ratios_and_verdicts(load, targets, timing):
    cpu = load("peers.cpu")
    times = {
        name: timing.Times.of([value]) for name, value in {"fourbit": 2.0, "torch bf16": 14.0, "read": 1.0}.items()
    }
    values = cpu.ratios(times)
    assert values == {"torch bf16": 7.0}
    row = cpu.Row("linear", "4×4 M=1 bf16", 1, times, values, targets.linear("bf16", 1))
    assert [(t.measure, value, verdict) for t, value, verdict in row.verdicts()] == [("torch bf16", 7.0, "met")]
    assert row.to_dict()["targets"][0]["verdict"] == "met"


def test_command_line(load, capsys):
    peers = load("peers.__main__")
    options = peers.arguments(["cpu", "--shapes", "64x128,32x64", "--m", "1,4", "--threads", "2", "--dtype", "bf16"])
    assert (options.shapes, options.m, options.threads, options.dtype) == (
        ((64, 128), (32, 64)),
        (1, 4),
        (2,),
        ("bf16",),
    )
    assert len(peers.arguments(["cpu"]).shapes) == 4
    assert peers.arguments(["cpu", "--quick"]).shapes == ((4096, 4096),)
    for wrong in (["--dtype", "int8"], ["--m", "0"], ["--shapes", "64"]):
        with pytest.raises(SystemExit):
            peers.arguments(["cpu", *wrong])
    assert "--dtype takes bf16" in capsys.readouterr().err


def test_every_contender_is_checked_before_it_is_timed(load):
    import torch

    contenders = load("peers.contenders")
    weights = contenders.CpuWeights((256, 128), None)
    x = torch.randn(4, 128)
    calls = {name: found[:1] for name, found in contenders.linear_calls(weights, x).items()}
    contenders.check(calls, weights, x, "fp32")
    with pytest.raises(RuntimeError, match="fourbit computes something else"):
        contenders.check({"fourbit": [lambda: calls["fourbit"][0]() * 1.001]}, weights, x, "fp32")


def test_what_others_use_is_not_negative(load):
    share = load("harness.others").Others().share()
    assert share is None or share >= 0
