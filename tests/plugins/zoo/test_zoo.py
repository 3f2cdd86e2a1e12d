"""Any model of transformers: on the fly, from a folder of `fourbit quantize` and in memory it is the same 4-bit model.

It is saved and read again with the same bits, and what bitsandbytes reads of it has the same values. The table in
plugins/fourbit_transformers/README.md says what comes of it: `python tests/plugins/zoo/table.py` writes it.
"""

from __future__ import annotations

import warnings
from dataclasses import astuple

import pytest
import torch

import fourbit
from fourbit.checkpoint.quantize import quantize_checkpoint
from tests.support import skip_or_fail

try:
    import transformers

    from fourbit_transformers import FourbitConfig
    from tests.plugins.zoo import table
    from tests.plugins.zoo.checks import BLOCKSIZES, examine, options
    from tests.plugins.zoo.entry import load, packed
    from tests.plugins.zoo.models import ZOO
except ImportError:
    skip_or_fail("transformers is not installed: pip install 'fourbit[test]'")

CASES = [pytest.param(name, marks=() if entry.daily else pytest.mark.long) for name, entry in ZOO.items()]


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, of a hundred models
        yield


@pytest.mark.parametrize("name", CASES)
def test_every_way_gives_the_same_model(name, tmp_path):
    entry = ZOO[name]
    if entry.model_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {entry.kind}")
    row = examine(entry, tmp_path)
    if table.made_with() == table.versions():
        assert str(row) == table.rows().get(name), f"the table says something else: {table.COMMAND} writes it anew"


def test_the_table_has_every_class():
    assert list(table.rows()) == list(ZOO)
    assert len({entry.kind for entry in ZOO.values()}) >= 120


def test_every_combination_of_options_is_tried():
    tried = {astuple(options(entry))[:3] for entry in ZOO.values() if entry.family != "MoE"}
    assert len(tried) == 12 and {blocksize for _, blocksize, _ in tried} == set(BLOCKSIZES)


def test_experts_double_quantized_in_a_folder(tmp_path):
    """Their scales have a mean of their own each, and that of their stack in memory: nearly the same model."""
    entry, config = ZOO["Qwen3MoeForCausalLM"], fourbit.QuantConfig(double_quant=True)
    entry.build().save_pretrained(tmp_path / "plain")
    on_the_fly = load(entry, tmp_path / "plain", quantization_config=FourbitConfig.of(config))
    quantize_checkpoint(tmp_path / "plain", tmp_path / "cli", config)
    stored, logits = load(entry, tmp_path / "cli"), entry.run(on_the_fly)
    assert packed(stored).keys() == packed(on_the_fly).keys()
    assert 0 < (entry.run(stored) - logits).norm() < 0.03 * logits.norm()
    for model, name in ((on_the_fly, "saved"), (stored, "saved-too")):
        model.save_pretrained(tmp_path / name)
        assert torch.equal(entry.run(load(entry, tmp_path / name)), entry.run(model))
