"""What tests of every folder share."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def skip_or_fail(reason: str) -> NoReturn:
    """Skip, or fail where FOURBIT_REQUIRE_ALL=1 says that nothing may be missing, as in CI."""
    if os.environ.get("FOURBIT_REQUIRE_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
