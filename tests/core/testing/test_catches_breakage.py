"""The conformance suite fails on broken backends, at the test that is about what is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from fourbit import plugins, registry
from tests.core.testing import broken


@dataclass(eq=False)
class Outcome:
    """What a nested session reported: the tests as module::test[parameters]."""

    exit_code: int = -1
    passed: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    skipped: set[str] = field(default_factory=set)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rsplit("/", 1)[-1].replace(".py::", "::")
        if report.failed:
            self.failed.add(name)
        elif report.skipped:
            self.skipped.add(name)
        elif report.when == "call":
            self.passed.add(name)


RunSuite = Callable[[type[broken.Unbroken], Iterable[str]], Outcome]


def function_of(name: str) -> str:
    """module::test of module::test[parameters."""
    return name.split("[")[0]


@pytest.fixture
def run_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunSuite]:
    """Runs tests of the suite in this process, which already has torch, on a backend registered for it."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of small ops, on a machine that other tests share
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def run(fault: type[broken.Unbroken], tests: Iterable[str]) -> Outcome:
        plugins.load()
        registry.register(fault())
        try:
            outcome = Outcome()
            outcome.exit_code = pytest.main(
                [
                    *("--pyargs", *(f"fourbit.testing.{test}" for test in tests)),
                    *("--backend", fault.name, "-q", "--tb=no", f"--rootdir={tmp_path}"),
                    *("-c", str(tmp_path / "pytest.ini"), "-p", "no:cacheprovider", "-p", "no:xdist"),
                ],
                plugins=[outcome],
            )
        finally:
            registry.unregister(fault.name)
        return outcome

    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("fault", broken.BREAKAGES, ids=lambda fault: fault.__name__)
def test_a_broken_backend_fails(run_suite, fault):
    expected = broken.BREAKAGES[fault]
    outcome = run_suite(fault, [function_of(expected)])
    assert outcome.exit_code == pytest.ExitCode.TESTS_FAILED
    assert any(name.startswith(expected) for name in outcome.failed), sorted(outcome.failed)


def test_the_unbroken_backend_passes(run_suite):
    """The same selection on the class that all the broken ones derive from."""
    outcome = run_suite(broken.Unbroken, sorted({function_of(test) for test in broken.BREAKAGES.values()}))
    assert outcome.exit_code == pytest.ExitCode.OK, sorted(outcome.failed)
    for test in broken.BREAKAGES.values():
        assert any(name.startswith(test) for name in outcome.passed), f"{test} did not run"


def test_faults_are_documented():
    assert all(fault.__doc__ for fault in broken.BREAKAGES) and len(broken.BREAKAGES) >= 10
