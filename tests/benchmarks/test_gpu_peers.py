"""The contests of a GPU, on tiny shapes and the CPU: who computes what, tables, verdicts. No time is asserted."""

from types import SimpleNamespace

import pytest
import torch

from tests.support import installed, skip_or_fail


def close(found, true):
    return float((found.float() - true.float()).norm() / true.float().norm())


@pytest.mark.parametrize("grad", [False, True])
def test_contenders_of_rows_multiply_by_one_weight(load, grad):
    rows = load("peers.rows")
    w = rows.CudaWeights((64, 128), load("harness.bnb").load(), device="cpu")
    w.cold_bytes = 100_000
    x = rows.input_for((64, 128), 5, "bf16", grad, "cpu")
    calls = rows.calls(w, x, "bf16", grad, (False, True))
    assert {rows.TORCH, rows.FOURBIT, rows.FOURBIT + rows.DOUBLE} <= set(calls)
    true = calls[rows.TORCH][0]()
    assert true.shape == (5, 128 if grad else 64)
    for who, own in calls.items():
        assert all(0 <= close(call(), true) < (0.01 if who == rows.TORCH else 0.15) for call in own), who
        assert len(own) * 64 * 128 * (2 if who == rows.TORCH else 0.57) > 100_000


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_contenders_of_experts_multiply_by_one_weight(load, grad, tokens):
    experts = load("peers.experts")
    w = experts.ExpertWeights((16, 64, 32), "bf16", (False, True), "cpu", cold=200_000)
    calls = experts.calls(w, tokens, "bf16", grad)
    assert len({len(own) for own in calls.values()}) == 1
    for torch_call, *others in zip(*calls.values(), strict=True):
        true = torch_call()
        assert true.shape == (8 * tokens, 32 if grad else 64)
        assert all(close(call(), true) < 0.15 for call in others)


def test_routing(load):
    experts = load("peers.experts")
    for tokens in (1, 5, 100):
        for ends in experts.routings(64, tokens, 8):
            assert len(ends) == 64 and ends[-1] == 8 * tokens and ends == sorted(ends)
            counts = torch.tensor(ends).diff(prepend=torch.tensor([0]))
            assert counts.max() <= tokens  # the experts of a token differ
    single = [torch.tensor(ends).diff(prepend=torch.tensor([0])) for ends in experts.routings(64, 1, 8)]
    assert torch.equal(sum(single), torch.ones(64, dtype=torch.long))  # none is warm from the call before


def test_checks_find_what_is_wrong(load, monkeypatch):
    rows, experts = load("peers.rows"), load("peers.experts")
    w = rows.CudaWeights((64, 128), None, device="cpu")
    w.cold_bytes = 0
    stacked = experts.ExpertWeights((16, 64, 32), "bf16", (True,), "cpu", cold=0)

    def all_checks():
        found = [
            rows.check(w, rows.input_for((64, 128), 9, dtype, grad, "cpu"), dtype, grad, double)
            for dtype in ("bf16", "fp16")
            for grad in (False, True)
            for double in (False, True)
        ]
        return found + [experts.check(stacked, 5, dtype, g, True) for dtype in ("bf16", "fp16") for g in (False, True)]

    assert all(check.good for check in all_checks())
    right = {module: module.product for module in (rows, experts)}
    for module, product in right.items():
        monkeypatch.setattr(module, "product", lambda *a, product=product: product(*a) * 1.01)
    assert not any(check.good for check in all_checks())
    for module, product in right.items():
        monkeypatch.setattr(module, "product", lambda *a, product=product: product(*a) * float("nan"))
    assert not any(check.good for check in all_checks())


def test_ratios_are_to_the_mean_of_both_turns(load):
    ratios = load("peers.ratios")
    times = {ratios.TORCH: (10.0, ""), ratios.FOURBIT: (5.5, "events"), ratios.AGAIN: (12.0, "")}
    found = ratios.cells("4x4", 64, times)
    assert {cell.who: cell.ratio for cell in found}[ratios.FOURBIT] == 2.0
    assert ratios.drift(found) == pytest.approx(0.2)
    assert ratios.body(found, (16, 64), ratios=True) == "| 4x4 | fourbit | – | 2.00 |"
    assert ratios.body(found, (64,), ratios=False).splitlines()[0] == "| 4x4 | torch | 10.0 |"
    assert ratios.heading("out x in", (16, 64)).splitlines() == ["| out x in | | 16 | 64 |", "|---|---|---|---|"]
    assert ratios.notes(found) == "4x4 fourbit at [64]: events"
    assert ratios.grouped([("a", "x"), ("b", "y"), ("c", "x")]) == "a; c:\n  x\nb:\n  y"


def test_a_run_ends_with_times_what_was_missed_and_wrong_results(load, capsys):
    ratios = load("peers.ratios")
    found = ratios.cells("4x4", 64, {ratios.TORCH: (10.0, ""), ratios.FOURBIT: (5.0, ""), ratios.AGAIN: (10.0, "")})
    budget = ratios.Budget(100.0)
    good, wrong = ratios.Check("right", 1e-3, 1e-3, True), ratios.Check("off", 1.0, 1e-3, True)
    ratios.conclude(found, "out x in", (64,), ["too slow"], "the way", [good], budget)
    out = capsys.readouterr().out
    assert "| 4x4 | fourbit | 5.0 |" in out and "below the target:\ntoo slow\nthe way" in out
    with pytest.raises(SystemExit, match="1"):
        ratios.conclude([], "out x in", (64,), [], "the way", [good, wrong], budget)
    out = capsys.readouterr().out
    assert "Microseconds" not in out and "off: 1, torch 0.001" in out


def test_the_device_is_busy_once_at_a_time(load):
    device_time = load("harness.device_time")
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(start, end, device_type=cuda, **more):
        return SimpleNamespace(device_type=device_type, time_range=SimpleNamespace(start=start, end=end), **more)

    events = [event(2000, 5000), event(0, 1000), event(4000, 6000), event(4500, 5500), event(9000, 9500)]
    events += [event(0, 99000, is_user_annotation=True), event(6000, 9000, cpu)]
    assert device_time.union_milliseconds(events) == 5.5
    assert device_time.union_milliseconds([]) == 0


def test_targets_of_many_rows(load):
    targets, rows = load("peers.targets"), load("peers.rows")
    large = {m: targets.many_rows((14336, 4096), m, False) for m in (16, 64, 96, 512, 1024, 2048, 8192)}
    assert large.pop(16) is None
    assert [t.least for t in large.values()] == [1.75, 1.5, 1.02, 1.0, 0.93, 0.93]
    assert targets.many_rows((8192, 8192), 16, False).least == 2.6
    assert targets.many_rows((1024, 4096), 16, False).least == 0.9
    assert targets.many_rows((8192, 8192), 256, True) is None
    assert targets.many_rows((8192, 8192), 512, True).least == 0.93
    assert [targets.experts(t).least for t in (1, 64, 65, 512, 2048, 8192)] == [2.0, 2.0, 1.0, 1.0, 0.93, 0.93]

    ratios = load("peers.ratios")
    times = {ratios.TORCH: (10.0, ""), ratios.FOURBIT: (10.0, ""), ratios.BNB: (9.0, ""), ratios.AGAIN: (10.0, "")}
    assert len(rows.judged(ratios.cells("", 128, times), (8192, 8192), False)) == 1
    assert "bitsandbytes" in rows.judged(ratios.cells("", 2048, times), (8192, 8192), False)[0]
    assert rows.judged(ratios.cells("", 1024, times), (8192, 8192), False) == []


def test_command_lines(load, capsys):
    rows, experts, ratios = load("peers.rows"), load("peers.experts"), load("peers.ratios")
    options = rows.arguments(["--shapes", "64x128,32x64", "--rows", "1,300", "--grad", "--double", "no"])
    assert (options.shapes, options.rows) == (((64, 128), (32, 64)), (1, 300))
    assert (ratios.passes(options.grad), ratios.passes(options.double)) == ((False, True), (False,))
    assert len(rows.arguments([]).shapes) == 9
    assert experts.arguments(["--experts", "4x8x16"]).experts == ((4, 8, 16),)
    with pytest.raises(SystemExit):
        experts.arguments(["--dtype", "fp16"])
    assert "bfloat16 only" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what there is to measure")
@pytest.mark.parametrize("name", ["rows", "experts", "training", "model"])
def test_without_a_gpu_they_say_so(load, name):
    if name in ("training", "model") and not installed("transformers"):
        skip_or_fail("transformers is not installed")
    with pytest.raises(SystemExit, match=f"peers {name}: no CUDA device"):
        load(f"peers.{name}").main([])
