"""The command where its streams are closed, end early, are full, or have few characters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fourbit.checkpoint.verify import verify_checkpoint
from tests.folders import write_folder

FOURBIT = [sys.executable, "-m", "fourbit.cli"]

DRIVER = """
import io, json, os, sys
import rich.progress, rich.table, safetensors.torch, torch, typer.rich_utils
import fourbit.checkpoint

def end(case):
    for number in (0, 1, 2):
        way = case["streams"][number]
        if way is None:
            os.close(number)
        elif way == "broken":  # the writing end of a pipe that nobody reads any more, as after `| head -1`
            read, write = os.pipe()
            os.close(read)
            os.dup2(write, number)
            os.close(write)
        else:
            file = os.open(way, os.O_RDWR | os.O_CREAT, 0o600)
            os.dup2(file, number)
            os.close(file)
    wrap = lambda n, mode, errors: open(n, mode, encoding=case["encoding"], errors=errors, closefd=False)
    sys.stdin, sys.stdout, sys.stderr = (  # as the interpreter does at its beginning
        None if way is None else wrap(n, mode, errors)
        for n, (way, mode, errors) in enumerate(zip(case["streams"], "rww", ("strict", "strict", "backslashreplace")))
    )
    sys.argv = ["fourbit"]
    sys.argv += case["arguments"]
    from fourbit.cli import main
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
    for stream in (sys.stdout, sys.stderr):  # as it does at its end
        try:
            stream.flush()
        except Exception:
            status = 120
    os._exit(status)

found = []
for case in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        try:
            end(case)
        finally:
            os._exit(121)
    found.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(found))
"""
"""Runs commands in copies of one process: importing torch thirty times would take a minute."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("streams")
    write_folder(place / "src")
    write_folder(place / "schön…[x]")
    (place / "none").mkdir()
    return place


COMMANDS = {
    "help": (["--help"], 0),
    "help of one": (["quantize", "--help"], 0),
    "usage": (["inspect"], 2),
    "inspect": (["inspect", "schön…[x]"], 0),
    "inspect json": (["inspect", "schön…[x]", "--json"], 0),
    "verify": (["verify", "src"], 0),
    "verify what is none": (["verify", "none"], 1),
    "estimate": (["estimate", "src"], 0),
    "compare": (["compare", "src", "schön…[x]"], 0),
    "dry run": (["quantize", "src", "dst", "--dry-run"], 0),
    "an error": (["quantize", "none", "dst"], 1),
    "traceback": (["--debug", "inspect", "none"], 1),
    "backends": (["backends"], 0),
}


SOME = ("help", "usage", "inspect", "inspect json", "verify", "verify what is none", "an error", "traceback")


def every(place, tmp_path, names, streams=("", "", ""), encoding="utf-8"):
    """(name, status, status it should have, stdout, stderr) of each command; of `streams` "" is a file."""
    cases = []
    for name in names:
        ways = [str(tmp_path / f"{name}.{i}") if way == "" else way for i, way in enumerate(streams)]
        cases.append({"arguments": COMMANDS[name][0], "streams": ways, "encoding": encoding})
    done = subprocess.run(
        *([sys.executable, "-c", DRIVER],),
        cwd=place,
        input=json.dumps(cases),
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for name, case, status in zip(names, cases, json.loads(done.stdout), strict=True):
        files = [Path(way or "/nowhere") for way in case["streams"][1:]]
        said = [file.read_bytes() if file.is_file() else b"" for file in files]
        assert name == "traceback" or all(b"Traceback" not in s and b"Exception ignored" not in s for s in said), said
        yield name, status, COMMANDS[name][1], *said


def test_few_characters(place, tmp_path):
    for name, status, want, out, err in every(place, tmp_path, tuple(COMMANDS), encoding="ascii"):
        assert status == want, (name, err)
        assert (out + err).isascii() and out + err, name
        if name == "inspect":
            text = out.decode()
            assert "300x64" in text and r"sch\xf6n...[x]: plain" in text and "+-" in text
        if name == "inspect json":
            assert json.loads(out)["path"] == "schön…[x]"


def test_closed_stdout(place, tmp_path):
    """The status is that of the work: nobody wants to see the rest."""
    for name, status, want, out, err in every(place, tmp_path, SOME, ("", None, "")):
        assert (status, out) == (want, b"") and bool(err) == (name in ("usage", "an error", "traceback")), name


def test_closed_stderr(place, tmp_path):
    for name, status, want, out, err in every(place, tmp_path, SOME, ("", "", None)):
        assert (status, err) == (want, b"") and bool(out) == (name not in ("usage", "an error", "traceback")), name


def test_all_closed(place, tmp_path):
    for name, status, want, out, err in every(place, tmp_path, SOME, (None, None, None)):
        assert (status, out, err) == (want, b"", b""), name


def test_closed_pipes(place, tmp_path):
    for name, status, want, _, err in every(place, tmp_path, SOME, ("", "broken", "")):
        assert status == (want or 1), (name, err)
    for name, status, _, _, _ in every(place, tmp_path, SOME, ("", "broken", "broken")):
        assert status in (1, 2), name
    for name, status, want, _, _ in every(place, tmp_path, ("inspect", "an error"), ("", "", "broken")):
        assert status == want, name


def test_a_full_disk(place, tmp_path):
    for name, status, _, _, err in every(place, tmp_path, ("inspect", "inspect json"), ("", "/dev/full", "")):
        assert (status, err) == (1, b"error: [Errno 28] No space left on device\n"), name


@pytest.mark.parametrize(
    ("env", "shell"),
    (
        ({"PYTHONIOENCODING": "ascii"}, ""),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, ""),
        ({}, ">&-"),
        ({}, "2>&-"),
        ({}, "| head -1"),
    ),
)
def test_in_a_shell(place, env, shell):
    """The real thing, for one command."""
    command = f"'{sys.executable}' -m fourbit.cli inspect src {shell}"
    done = subprocess.run(["sh", "-c", command], cwd=place, env={**os.environ, **env}, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert not env or (done.stdout.isascii() and b"300x64" in done.stdout)
    assert (done.stdout == b"") == (shell == ">&-")


def test_nothing_else_gets_the_number_of_a_closed_stream(place, tmp_path):
    """Or what a library prints would go into the weights."""
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    done = subprocess.run([*closed, *FOURBIT, "quantize", "src", str(tmp_path / "a")], cwd=place, timeout=120)
    assert done.returncode == 0
    assert verify_checkpoint(tmp_path / "a").ok
    code = (
        "import os; from fourbit.cli import streams; streams.prepare()\n"
        f"file = open({str(tmp_path / 'x')!r}, 'w')\n"
        "os.write(1, b'noise'); os.write(2, b'noise'); print('more')\n"
        "raise SystemExit(0 if file.fileno() > 2 else 3)\n"
    )
    done = subprocess.run([*closed, sys.executable, "-c", code], timeout=120)
    assert done.returncode == 0 and (tmp_path / "x").read_text() == ""
