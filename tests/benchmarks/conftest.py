"""The benchmarks' modules, imported as their scripts import them."""

import importlib
import sys
from pathlib import Path

import pytest

from tests.support import skip_or_fail


@pytest.fixture(scope="session")
def benchmarks():
    """Where they are."""
    found = Path(__file__).parents[2] / "asv_benchmarks"
    if not found.is_dir():
        skip_or_fail("the folder asv_benchmarks is not here")
    return found


@pytest.fixture(scope="module")
def load(benchmarks):
    """Imports a module of asv_benchmarks, as its scripts do, and leaves nothing of it behind."""
    before = set(sys.modules)
    sys.path.insert(0, str(benchmarks))
    yield importlib.import_module
    sys.path.remove(str(benchmarks))
    for name in set(sys.modules) - before:
        if str(benchmarks) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]
