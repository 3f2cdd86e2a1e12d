"""Pytest's side of the conformance suite: the options --backend and --device, and how the suite is imported.

Installed as the top-level module `fourbit_pytest`, and loaded by every pytest session of the environment
through the entry point of the group `pytest11`: a conftest.py is read too late for `--pyargs`. So it
imports neither fourbit nor torch, and does nothing in a session that does not ask for `fourbit.testing`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from functools import lru_cache
from pathlib import Path

import pytest

SUITE = "fourbit.testing"
FIXTURES = f"{SUITE}.fixtures"
USAGE = f"pytest --pyargs {SUITE} --backend NAME [--device DEVICE]"


@lru_cache(maxsize=1)
def _suite_folder() -> Path | None:
    """The folder of the suite, found without importing fourbit."""
    spec = importlib.util.find_spec("fourbit")
    return Path(spec.origin).parent / "testing" if spec is not None and spec.origin else None


def _asks_for_suite(arguments: tuple[object, ...]) -> bool:
    """Whether a session's command line names the suite, as a package or by its path."""
    for argument in map(str, arguments):
        if argument == SUITE or argument.startswith((f"{SUITE}.", f"{SUITE}::")):
            return True
        path = Path(argument.split("::")[0])
        if path.name == "testing" or path.parent.name == "testing":
            folder = _suite_folder()
            if folder is not None and path.resolve() in (folder, folder / path.name):
                return True
    return False


def _is_suite_session(config: pytest.Config) -> bool:
    return _asks_for_suite((*config.invocation_params.args, *getattr(config, "args", ())))


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    # Only where the suite is asked for: other projects have options of these names, and a second one of a
    # name is an error in whichever plugin comes later.
    config = pluginmanager.get_plugin("pytestconfig")
    if config is None or not _asks_for_suite(config.invocation_params.args):
        return
    group = parser.getgroup("fourbit", "fourbit backend conformance")
    # taken by another plugin: its value is read instead
    with contextlib.suppress(ValueError):
        group.addoption("--backend", metavar="NAME", help="the fourbit backend to test")
    with contextlib.suppress(ValueError):
        group.addoption("--device", metavar="DEVICE", help="torch device to test on (default: the backend's first)")


def pytest_configure(config: pytest.Config) -> None:
    if not _is_suite_session(config) or config.option.help:
        return
    pytest.register_assert_rewrite(SUITE)
    fixtures = importlib.import_module(FIXTURES)
    fixtures.check_options(config)
    config.pluginmanager.register(fixtures, FIXTURES)
    # torch's own, when it compiles; a session that turns warnings into errors means its own code
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit:DeprecationWarning")
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"  # what a backend declines is never hidden


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # a session over a whole checkout meets the suite by accident, with no backend to test
    if collection_path.name == "testing" and collection_path == _suite_folder():
        return None if _is_suite_session(config) else True
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    # a Package would import its __init__.py under the name that the session's import mode gives it
    if not _is_suite_session(parent.config):
        return None
    folder = _suite_folder()
    if folder is not None and path in (folder, folder.parent):
        return pytest.Dir.from_parent(parent, path=path)
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if module_path.parent == _suite_folder():
        # one name wherever it is installed and whatever the session's root is
        return SuiteModule.from_parent(parent, path=module_path, nodeid=f"fourbit/testing/{module_path.name}")
    return None


class SuiteModule(pytest.Module):
    """A module of the suite, imported by its real name whatever pytest's import mode."""

    def _getobj(self) -> object:
        return importlib.import_module(f"{SUITE}.{self.path.stem}")
