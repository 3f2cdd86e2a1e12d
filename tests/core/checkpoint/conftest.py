"""The folders of a run, for the tests here that have no others."""

from __future__ import annotations

import pytest

import fourbit
from fourbit.checkpoint.quantize import quantize_checkpoint
from tests.folders import contents, write_folder


@pytest.fixture
def src(tmp_path):
    return write_folder(tmp_path / "src")


@pytest.fixture
def dst(src, tmp_path):
    """A folder that is to be replaced."""
    quantize_checkpoint(src, tmp_path / "dst", fourbit.QuantConfig("fp4"))
    return tmp_path / "dst"


@pytest.fixture
def want(src, tmp_path):
    """What a run is to leave."""
    quantize_checkpoint(src, tmp_path / "want")
    return contents(tmp_path / "want")
