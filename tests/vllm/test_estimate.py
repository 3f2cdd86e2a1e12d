"""The README's arithmetic on two large models is what the program says, of these models' shapes. Needs no vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourbit_vllm import estimate

README = Path(__file__).parents[2] / "plugins" / "fourbit_vllm" / "README.md"


def test_the_readme_has_the_tables():
    printed = "\n".join(estimate.lines(8, 80, (1, 4, 16), 4096, 20e-6))
    assert printed in README.read_text()


@pytest.mark.parametrize(
    ("model", "parameters", "embeddings"),
    [(estimate.dense_405b, 405.85e9, 2 * 128256 * 16384), (estimate.moe_671b, 671.0e9, 2 * 129280 * 7168)],
)
def test_the_shapes_have_the_published_numbers_of_parameters(model, parameters, embeddings):
    found = sum(each.out * each.width * each.count * each.layers for each in model(1).products) + embeddings
    if model is estimate.moe_671b:  # what is absorbed into attention, and routers
        found += 128 * 256 * 512 * 61 + 256 * 7168 * 58
    assert found == pytest.approx(parameters, rel=1e-3)


def test_ranks_share_the_weights():
    for model in (estimate.dense_405b, estimate.moe_671b):
        assert 8 * model(8).weights == pytest.approx(model(1).weights, rel=0.02)


def test_the_fit_is_near_what_was_measured():
    for rows, points in estimate.MEASURED.items():
        call, speed = estimate.fit(rows)
        for out, width, microseconds in points:
            nbytes = estimate.quantized_nbytes(out * width, 64, False)
            assert 1e6 * (call + nbytes / speed) == pytest.approx(microseconds, rel=0.15)


def test_a_batch_reads_more_experts():
    experts = estimate.Product(16, 16, 1, 257, 9)
    assert estimate.touched(experts, 1) == pytest.approx(9)
    assert 9 < estimate.touched(experts, 4) < 33
    assert estimate.touched(experts, 10_000) == pytest.approx(257)
