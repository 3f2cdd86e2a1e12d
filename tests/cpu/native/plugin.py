"""Pytest plugin: registers NativeServerBackend with the command in FOURBIT_TEST_SERVER, for the conformance suite."""

from __future__ import annotations

import json
import os

import pytest

from fourbit import plugins, registry
from tests.cpu.native.backend import NativeServerBackend
from tests.cpu.native.client import Server


@pytest.hookimpl(tryfirst=True)  # before the suite looks for the backend that it is to test
def pytest_configure(config: pytest.Config) -> None:
    command, isa = json.loads(os.environ["FOURBIT_TEST_SERVER"])
    config.stash[SERVER] = Server(command, isa)
    plugins.load()
    registry.register(NativeServerBackend(config.stash[SERVER]))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A sanitizer that complains at the end (of a leak) fails the session."""
    status = session.config.stash[SERVER].close()
    if status != 0:
        pytest.exit(f"the server ended with status {status}", returncode=1)


SERVER = pytest.StashKey[Server]()
