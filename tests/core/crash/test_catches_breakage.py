"""The tests of what keeps folders whole fail where it is broken, each at the test that is about it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.core.crash import broken

pytestmark = pytest.mark.skipif(os.name == "nt", reason="folders cannot be flushed there")

TESTS = Path(__file__).parents[1]


class Outcome:
    """What a nested session reported."""

    def __init__(self) -> None:
        self.exit_code, self.passed, self.failed = -1, [], []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append((report.nodeid, report.when, str(report.longrepr)))
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)


@pytest.fixture
def run_tests(tmp_path, monkeypatch):
    """Runs tests in this process, with a fault in the code that they test."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def run(tests, fault=None):
        outcome = Outcome()
        with pytest.MonkeyPatch.context() as patch:
            if fault is not None:
                fault(patch)
            outcome.exit_code = pytest.main(
                [
                    *(str(TESTS / test) for test in tests),
                    *("-q", "--tb=short", "--import-mode=importlib", "--noconftest", f"--rootdir={TESTS}"),
                    *("-c", str(tmp_path / "pytest.ini"), f"--basetemp={tmp_path / 'nested'}"),
                    *("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "tests.core.checkpoint.conftest"),
                ],
                plugins=[outcome],
            )
        return outcome

    return run


@pytest.mark.parametrize("fault", broken.FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found(run_tests, fault):
    test, says = broken.FAULTS[fault]
    outcome = run_tests([test], fault)
    assert outcome.exit_code == pytest.ExitCode.TESTS_FAILED
    assert any(when == "call" and says in text for _, when, text in outcome.failed), outcome.failed


def test_without_a_fault_they_pass(run_tests):
    tests = dict.fromkeys(test for test, _ in broken.FAULTS.values())
    outcome = run_tests(tests)
    assert outcome.exit_code == pytest.ExitCode.OK, outcome.failed
    for test in tests:
        assert any(test.rpartition("/")[2] in nodeid for nodeid in outcome.passed), f"{test} did not run"


def test_faults_are_documented():
    assert all(fault.__doc__ for fault in broken.FAULTS)
