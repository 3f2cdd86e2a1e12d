"""The conformance suite on "rocm" through the emulator, for both wave sizes, thinned out to what CI has time for."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fourbit.testing
from fourbit import plugins, registry
from tests.rocm.gcn.backend import EmulatedBackend

PARAMETERS = 6
"""Parameter sets of each test function that are run; the two architectures take different ones.

FOURBIT_ALL_PARAMETERS=1 with --long runs them all, and those of TOO_LARGE, some ten minutes for each architecture.
"""

TOO_LARGE = ("test_quantize.py::test_large", "test_linear.py::test_large", "test_blockwise.py::test_large")
"""Half a minute each, and more: a million elements. Their ragged sizes are in test_kernels.py, smaller."""

ARCHS = ("gfx90a", "gfx1030")
LAUNCH_NOTHING = ("test_contract", "test_fake", "test_state")
"""Modules that only ask."""

QUICK = (("test_embedding", "gfx90a"), ("test_embedding", "gfx1030"))
"""What a short run takes of it."""

MODULES = sorted(path.stem for path in Path(fourbit.testing.__file__).parent.glob("test_*.py"))


class Thinned:
    """Keeps some parameter sets of every test function, spread evenly, and counts outcomes."""

    def __init__(self, arch: str, most: int | None) -> None:
        self.arch, self.most = arch, most
        self.passed: set[str] = set()
        self.failures: list[str] = []

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if self.most is None:
            return
        functions: dict[str, list[pytest.Item]] = {}
        for item in items:
            if item.nodeid.split("[")[0].endswith(TOO_LARGE):
                continue
            functions.setdefault(item.nodeid.split("[")[0], []).append(item)
        kept = []
        for name, all_of_it in functions.items():
            start = zlib.crc32((self.arch + name).encode())
            count = min(self.most, len(all_of_it))
            kept += [all_of_it[(start + i * len(all_of_it) // count) % len(all_of_it)] for i in range(count)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failures.append(f"{report.nodeid}\n{report.longreprtext[-1500:]}")
        elif report.passed and report.when == "call":
            self.passed.add(report.nodeid)


def runs() -> Iterator[Any]:
    """A module of the suite and an architecture; those that launch nothing on one only."""
    for module in MODULES:
        for arch in ARCHS[:1] if module in LAUNCH_NOTHING else ARCHS:
            marks = () if (module, arch) in QUICK else pytest.mark.long
            yield pytest.param(module, arch, marks=marks, id=f"{module}-{arch}")


@pytest.mark.long
@pytest.mark.parametrize(("module", "arch"), list(runs()))
def test_conformance(module, arch, device, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    most = None if os.environ.get("FOURBIT_ALL_PARAMETERS") == "1" else PARAMETERS
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    thinned = Thinned(arch, most)
    plugins.load()
    # more units than elsewhere: the emulator runs workgroups side by side faster than one tile after another
    registry.register(EmulatedBackend(device, arch, units=4))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = len(device.launches)
    try:
        status = pytest.main(
            [
                *("--pyargs", f"fourbit.testing.{module}", "--backend", "rocm", "-q", "--tb=short"),
                *(f"--rootdir={tmp_path}", "-c", str(tmp_path / "pytest.ini")),
                *("-p", "no:cacheprovider", "-p", "no:xdist"),
            ],
            plugins=[thinned],
        )
    finally:
        torch.set_num_threads(threads)
        registry.unregister("rocm")
    assert status == pytest.ExitCode.OK, "\n\n".join(thinned.failures)
    assert thinned.passed
    if module not in LAUNCH_NOTHING:
        assert len(device.launches) > before, f"{module} launched nothing"
