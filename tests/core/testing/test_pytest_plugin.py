"""The pytest plugin that fourbit installs leaves other projects' sessions alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

IMPORTS_NOTHING = """
import sys

def pytest_addoption(parser):
    parser.addoption("--backend", default="theirs")
    parser.addoption("--device", default="theirs too")

def pytest_configure(config):
    assert config.getoption("--backend") == "theirs"
    assert not {"fourbit", "torch"} & set(sys.modules), "a session that has nothing to do with fourbit imports it"
"""


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_another_projects_option_of_the_same_name(tmp_path):
    (tmp_path / "conftest.py").write_text(IMPORTS_NOTHING)
    (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
    done = pytest_in(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_another_plugin_took_the_option_first(tmp_path):
    """Its value names the backend."""
    (tmp_path / "other.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--backend')\n")
    tests = "fourbit.testing.test_contract::test_attributes"
    command = [sys.executable, "-c", "import sys, pytest; sys.path.insert(0, '.'); sys.exit(pytest.main(sys.argv[1:]))"]
    arguments = ["-p", "other", "--pyargs", tests, "--backend", "reference", "-q"]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mode", ("prepend", "append", "importlib"))
def test_every_import_mode(tmp_path, mode):
    done = pytest_in(
        tmp_path,
        *("--pyargs", "fourbit.testing.test_contract", "--backend", "reference", f"--import-mode={mode}"),
        *("-W", "error::DeprecationWarning", "--strict-markers"),
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_session_over_a_whole_checkout_leaves_the_suite_out(tmp_path):
    """`pytest FOLDER`, where the folder holds fourbit itself, has no backend to test."""
    import fourbit

    package = Path(fourbit.__file__).parent
    done = pytest_in(tmp_path, str(package), "--collect-only")
    assert "test_contract" not in done.stdout, done.stdout
