"""Servers, built once in a session: also where several pytest-xdist workers share it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cpu.native import builds

ServerCommand = Callable[[str, str], list[str]]


@pytest.fixture(scope="session")
def server_command(tmp_path_factory: pytest.TempPathFactory) -> ServerCommand:
    """`server_command(build, isa)`: the command to add the instruction set to; skips where it cannot run here."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = Path(os.environ.get("FOURBIT_TEST_BUILDS", folder / "native"))
    folder.mkdir(parents=True, exist_ok=True)

    def command(build: str, isa: str) -> list[str]:
        found = builds.server_command(build, folder)
        if isa not in builds.instruction_sets(tuple(found)):
            pytest.skip(f"this processor has no {isa}")
        return found

    return command
