"""The suite's fixtures: the backend under test, its device, and `need`, which skips what it declines."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from fourbit import dispatch, plugins, registry
from fourbit.backend import Backend, OpQuery
from fourbit_pytest import SUITE, USAGE

Need = Callable[..., None]


def check_options(config: pytest.Config) -> None:
    """Raise UsageError unless --backend names a ready backend and there is a device to test it on."""
    name = config.getoption("--backend", None)
    ready = ", ".join(info.name for info in plugins.backends() if info.state == "ready")
    if not name:
        raise pytest.UsageError(f"{SUITE} tests one backend: {USAGE}\nReady here: {ready}")
    infos = [info for info in plugins.backends() if info.name == name]
    if not any(info.state == "ready" for info in infos):
        why = "".join(f"\n{info.name} is {info.state}: {info.reason}\n{info.traceback}" for info in infos)
        raise pytest.UsageError(f"there is no ready backend {name!r}; ready here: {ready}{why}")
    _choose_device(config, plugins.get_backend(name))


def _choose_device(config: pytest.Config, backend: Backend) -> torch.device:
    asked = config.getoption("--device", None)
    types = [asked] if asked else ["cpu" if kind == "*" else kind for kind in backend.device_types]
    failures = []
    for kind in types:
        try:
            device = torch.empty(1, device=kind).device  # with its index
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            failures.append(f"{kind}: {error}")
            continue
        if not {"*", device.type} & set(backend.device_types):
            raise pytest.UsageError(f"backend {backend.name!r} serves {backend.device_types}, not {device.type!r}")
        return device
    raise pytest.UsageError(f"no device to test backend {backend.name!r} on: {'; '.join(failures)}")


def pytest_report_header(config: pytest.Config) -> str:
    backend = plugins.get_backend(config.getoption("--backend"))
    return f"fourbit: conformance of backend {backend.name!r} on {_choose_device(config, backend)}"


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The backend under test, which alone runs every op while the test runs."""
    torch.manual_seed(0)
    with dispatch.use_backend(request.config.getoption("--backend")) as chosen:
        yield chosen


@pytest.fixture
def device(request: pytest.FixtureRequest, backend: Backend) -> torch.device:
    """Where the tensors lie."""
    return _choose_device(request.config, backend)


@pytest.fixture
def need(backend: Backend, device: torch.device) -> Need:
    """`need(op, dtype, blocksize, double_quant)`: skip, with the backend's reason, unless it supports that."""

    def ask(op: str, dtype: torch.dtype = torch.float32, blocksize: int = 64, double_quant: bool = False) -> None:
        query = OpQuery(op, device, dtype, blocksize, double_quant)
        with warnings.catch_warnings():
            warnings.simplefilter("error", registry.BackendWarning)  # supports() raised: that is no answer
            answer = dispatch.ask(backend, query)
        if not answer:
            pytest.skip(f"{backend.name} declines {dispatch.format_query(query)}: {answer.reason}")

    return ask
