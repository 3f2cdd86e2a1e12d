"""What the host's training calls are: forward and backward of each layer, on a backend that does nothing."""

import pytest
import torch


@pytest.fixture
def training(load):
    return load("harness.training")


def test_a_call_is_forward_and_backward_of_each_layer(training):
    layer = torch.nn.Linear(4, 4, bias=False).requires_grad_(False)
    x = torch.randn(1, 4)
    for depth in (1, 3):
        (grad,) = training.training_call(layer, x, depth)()
        torch.testing.assert_close(grad, torch.ones(1, 4) @ torch.linalg.matrix_power(layer.weight, depth))
    assert x.grad is None and not x.requires_grad


def test_times_are_of_one_layer_and_of_each_further_one(training, monkeypatch):
    calls = []

    def clock(timed, rounds, batch):
        calls.append(len(timed))
        return {name: call() for name, call in timed.items()}

    monkeypatch.setattr(training, "microseconds", clock)
    # a call of so many layers takes 10 µs and 3 for each, or 5 for each
    monkeypatch.setattr(training, "training_call", lambda layer, x, depth: lambda: 10.0 + layer * depth)
    found = training.training_microseconds({"base": 3, "other": 5}, torch.zeros(1))
    assert found == {"base": (13.0, 3.0), "other": (15.0, 5.0)} and calls == [2, 2]
    rows = training.table(found, "base", "title").splitlines()
    assert rows[2].split() == ["other", "15.0", "1.15", "5.0", "1.67"]


def test_fourbits_kernels_do_nothing_there(load, training):
    import fourbit

    null_backend = load("harness.null_backend")
    with null_backend.training_layers() as (layers, x):
        assert list(layers)[0] == "torch nn.Linear"
        found = training.training_microseconds(layers, x, rounds=1)
        assert list(found) == list(layers) and all(one > 0 for one, _ in found.values())
        assert fourbit.explain(layers["Linear4bit"]).backend == "null"
    assert "null" not in [info.name for info in fourbit.backends()]
