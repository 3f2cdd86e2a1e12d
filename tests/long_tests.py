"""The switch for long tests: what is marked `long` runs with `pytest --long`, or when it is asked for by name.

A plain `pytest` is for whoever has just installed fourbit: it takes minutes on two cores, runs in as many processes as
there are cores where pytest-xdist is installed, and says at its end how many tests it left out. Continuous
integration runs them all.
"""

from __future__ import annotations

import os

import pytest

MOST_WORKERS = 8
"""More processes than this gain little: each imports torch, and takes about a gigabyte."""

_left_out = pytest.StashKey[int]()


def wanted(config: pytest.Config) -> bool:
    """Whether long tests run: --long, or a selection that the user has made (`-m`, a test's own name)."""
    named = any("::" in str(argument) for argument in config.invocation_params.args)
    return bool(config.getoption("--long") or config.getoption("markexpr") or named)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fourbit")
    group.addoption("--long", action="store_true", help="also the tests that take long (marked `long`)")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A whole run takes a process for each core; `-n` or `--pdb` says otherwise."""
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    if whole and config.option.numprocesses is None and config.option.dist == "no" and not config.option.usepdb:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if cores > 1:
            config.option.numprocesses = min(cores, MOST_WORKERS)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if wanted(config):
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    config.stash[_left_out] = len(left_out)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # every xdist worker collects the same tests
        session.config.workeroutput["long_left_out"] = session.config.stash.get(_left_out, 0)


class _FromWorkers:
    """Registered where xdist is, whose hook it implements."""

    @staticmethod
    def pytest_testnodedown(node: object) -> None:
        output = getattr(node, "workeroutput", None) or {}
        stash = node.config.stash  # type: ignore[attr-defined]
        stash[_left_out] = max(stash.get(_left_out, 0), output.get("long_left_out", 0))


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(_FromWorkers())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    count = config.stash.get(_left_out, 0)
    if count:
        terminalreporter.write_line(f"{count} long tests were left out; `pytest --long` runs them too")
