"""The command as a shell sees it: exit status, what goes to which stream, pipes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.folders import write_folder

FOURBIT = [sys.executable, "-m", "fourbit.cli"]


def run(*arguments, **options):
    command = [*FOURBIT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, **options)


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "src")


def test_exit_status(src, tmp_path):
    done = run("quantize", src, tmp_path / "dst", "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["bytes_after"] > 0
    again = run("quantize", src, tmp_path / "dst")
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.startswith("error: the destination ") and again.stderr.count("\n") == 1
    assert run("quantize", src).returncode == 2
    assert run("nonsense").returncode == 2


def test_help_and_version():
    done = run("--help")
    assert done.returncode == 0 and all(name in done.stdout for name in ("quantize", "inspect", "estimate", "demo"))
    assert run("--version").stdout.startswith("fourbit 0.")


def test_commands_import_nothing_heavy():
    """The modules of the commands themselves; what `import fourbit` brings is not theirs."""
    code = (
        "import sys, types, importlib.util as u\n"
        "where = u.find_spec('fourbit').submodule_search_locations\n"
        "package = types.ModuleType('fourbit'); sys.modules['fourbit'] = package\n"
        "package.__path__ = list(where)\n"
        "import fourbit.cli.app\n"
        "print([m for m in ('torch', 'numpy', 'safetensors', 'transformers', 'platformdirs') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_list_of_commands_imports_no_library():
    """Nor does the demo's command, which a plugin adds, before it runs."""
    code = (
        "import sys; from fourbit.cli.app import app; app(['--help'], standalone_mode=False)\n"
        "assert 'fourbit_demo.command' in sys.modules\n"
        "heavy = ('transformers', 'fourbit.nn', 'fourbit.checkpoint', 'safetensors')\n"
        "print([m for m in heavy if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "demo" in done.stdout and done.stderr.strip() == "[]"


def test_closed_pipe(src):
    """`fourbit inspect … | head -1` ends without a traceback."""
    command = f"'{sys.executable}' -m fourbit.cli inspect '{src}' | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
