"""What tests of every folder share."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, distribution
from typing import NoReturn

import pytest


def skip_or_fail(reason: str) -> NoReturn:
    """Skip, or fail where FOURBIT_REQUIRE_ALL=1 says that nothing may be missing, as in CI."""
    if os.environ.get("FOURBIT_REQUIRE_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def installed(name: str) -> bool:
    """Whether the distribution `name` is installed.

    Not find_spec, which for "pip" makes setuptools take distutils out of the process: whoever imports setuptools
    or distutils later in the same process fails.
    """
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
