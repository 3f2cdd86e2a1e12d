"""Any model of transformers: on the fly, from a folder of `fourbit quantize` and in memory it is the same 4-bit model.

It is saved and read again with the same bits, and what bitsandbytes reads of it has the same values. The table in
plugins/fourbit_transformers/README.md says what comes of it: `python tests/plugins/zoo/table.py` writes it.
"""

from __future__ import annotations

import warnings

import pytest

from tests.support import skip_or_fail

try:
    import transformers

    from tests.plugins.zoo import table
    from tests.plugins.zoo.checks import examine
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
    assert len({entry.kind for entry in ZOO.values()}) >= 100
