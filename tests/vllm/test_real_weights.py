"""SmolLM2-135M-Instruct in 4 bits: vLLM answers with the tokens of transformers."""

from __future__ import annotations

import pytest

from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.config import QuantConfig
from tests.support import need, skip_or_fail

need("transformers")

from tests.vllm import engine, models  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory, needs_vllm):
    from fourbit_demo import sample_model

    root = tmp_path_factory.mktemp("smollm2")
    try:
        gguf, _ = sample_model.find_weights()
        sample_model.convert(gguf, root / "16")
    except (sample_model.SampleModelError, ImportError) as error:
        skip_or_fail(f"SmolLM2's weights cannot be had: {error}")
    quantize_checkpoint(root / "16", root / "4", QuantConfig(blocksize=64, double_quant=True))
    return root / "4"


def test_tokens_are_those_of_transformers(folder, tmp_path):
    """Its 9 heads do not divide among two ranks."""
    (answer,) = engine.run(tmp_path, [{"folder": str(folder)}])
    assert answer["tokens"] == models.reference(folder)
    assert len(answer["layers"][0]) == 4 * 30
