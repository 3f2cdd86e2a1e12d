"""peers.expert_offload: its model is what its arithmetic counts, and computes the same wherever the experts are."""

import pytest
import torch

from fourbit.nn import ExpertWeights4bit, Linear4bit
from tests.support import need

need("transformers", "peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def script(load):
    return load("peers.expert_offload")


def test_the_arithmetic_counts_what_is_there(script):
    model = script.build(script.SMALL, torch.device("cpu"), offload=False)
    parts = script.arithmetic(script.SMALL, 64)

    def packed(kind):
        return sum(m.qweight.nbytes + m.scales.nbytes for m in model.modules() if isinstance(m, kind))

    tuned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plain = sum(p.nbytes for p in model.parameters() if p.is_floating_point() and not p.requires_grad and p.dim() > 1)
    assert packed(ExpertWeights4bit) == parts["packed experts, all"] == 3 * parts["packed experts, a layer"]
    assert packed(Linear4bit) == parts["attention, packed"]
    assert plain == parts["embedding, head, routers"]
    assert tuned * 16 == parts["adapters, gradients, AdamW (float32)"]


def test_experts_of_30b_fit_a_card_of_12_gb_in_host_memory_only(script):
    here, there = script.totals(script.arithmetic(script.QWEN3_30B_A3B, 2048))
    assert there < 12e9 < 16e9 < here


def test_it_measures(script):
    model = script.build(script.SMALL, torch.device("cpu"), offload=True)
    found = script.measure(model, torch.device("cpu"), tokens=32, steps=1)
    assert found["seconds"] > 0 and found["losses"][1] < found["losses"][0] < 10
