"""What a stranger's folder may do to the terminal: nothing. Every string is shown as it is, or as an escape."""

from __future__ import annotations

import io
import json
import re
import sys
import unicodedata

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import fourbit
from fourbit.cli import console, errors
from fourbit.cli.app import app
from fourbit.literal import literal
from tests.folders import write_folder

EVIL = "\x1b]0;x\x07\x9b2J\u202e\u2066\u2028\r\n\x00\ud800[bold red]:bomb:[/bold red]"
SHOWN = r"\x1b]0;x\x07\x9b2J\u202e\u2066\u2028\r\n\x00\ud800[bold red]:bomb:[/bold red]"
NAME = EVIL.replace("\x00", "").replace("/", "").replace("\ud800", "")  # what a file may be called
NAME_SHOWN = SHOWN.replace(r"\x00", "").replace("/", "").replace(r"\ud800", "")
TENSOR = EVIL.replace("\ud800", "")
TENSOR_SHOWN = SHOWN.replace(r"\ud800", "")


def run(*arguments):
    """Both streams of a command, in lines as long as need be."""
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "4000"}, prog_name="fourbit")


def harmless(text):
    """Nothing but printable characters and line ends."""
    return all(c == "\n" or unicodedata.category(c)[0] != "C" and c not in "\u2028\u2029" for c in text)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "out", console._console(stderr=False))
    monkeypatch.setattr(console, "err", console._console(stderr=True))
    for made in (console.out, console.err):
        made._width = 4000
    src = write_folder(tmp_path / NAME, {"a.q_proj.weight": torch.randn(8, 64), f"{TENSOR}.weight": torch.randn(8, 64)})
    (src / f"{NAME}.bin").write_bytes(b"")
    (src / f"{NAME}.txt").symlink_to("/etc")
    return src


def test_every_command(folder, tmp_path):
    """Names of tensors, files and folders in tables, titles, messages and warnings."""
    dst = tmp_path / f"{NAME} 4"
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "model.safetensors"
    save_file({"a.q_proj.weight": torch.randn(8, 64), f"{TENSOR}.weight": torch.randn(4, 4)}, other)
    (tmp_path / "faulty").mkdir()
    commands = {
        "quantize": ([folder, dst], 0, NAME_SHOWN),
        "dry run": ([folder, tmp_path / "new", "--dry-run"], 0, TENSOR_SHOWN),
        "inspect": ([dst], 0, TENSOR_SHOWN),
        "verify": ([dst], 0, NAME_SHOWN),
        "estimate": ([folder], 0, NAME_SHOWN),
        "compare": ([folder, other], 1, TENSOR_SHOWN),
        "dequantize": ([dst, tmp_path / f"{NAME} 16"], 0, NAME_SHOWN),
        "quantize again": ([folder, dst], 1, NAME_SHOWN),
    }
    for name, (arguments, status, shown) in commands.items():
        command = {"dry run": "quantize", "quantize again": "quantize"}.get(name, name)
        done = run(command, *arguments)
        assert done.exit_code == status, (name, done.output)
        assert harmless(done.output), name
        assert shown in done.output, name
        if name == "quantize":
            assert f"not copied: {NAME_SHOWN}.txt, " in done.stderr and f"{NAME_SHOWN}.bin" in done.stderr
    file = dst / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8] + b"xxxxxxxx")
    for command, arguments in (("verify", [dst]), ("inspect", [tmp_path / f"{NAME} nowhere"])):
        done = run(command, *arguments)
        assert done.exit_code == 1 and harmless(done.output) and NAME_SHOWN in done.output


@pytest.mark.parametrize(
    "config",
    ({"quantization_config": {"quant_method": EVIL}}, {"text_config": {"quantization_config": {"quant_method": EVIL}}}),
)
def test_values_of_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    shown = run("inspect", folder)
    assert shown.exit_code == 0 and harmless(shown.output) and f"quantized by {SHOWN}" in shown.stdout
    for command in (
        ["quantize", folder, folder / ".." / "x"],
        ["dequantize", folder, folder / ".." / "x"],
        ["estimate", folder],
    ):
        done = run(*command)
        assert done.exit_code == 1 and harmless(done.output)
        assert command[0] == "dequantize" or SHOWN in done.stderr


def test_json_stays_exact(folder):
    value = json.loads(run("inspect", folder, "--json").stdout)
    assert value["path"] == str(folder)
    assert f"{TENSOR}.weight" in [t["name"] for t in value["tensors"]]


def test_a_plan_that_is_printed(folder):
    planned = fourbit.plan(folder)
    assert harmless(str(planned)) and f"{TENSOR_SHOWN}.weight" in str(planned) and harmless(planned.summary())


def test_exceptions_of_others(capsys):
    """Also in a traceback, and however long."""
    errors.say(KeyError(EVIL))
    errors.say(ValueError("x" * 10**6))
    try:
        raise ValueError(EVIL)
    except ValueError as error:
        errors.show(error)
    said = capsys.readouterr().err
    assert harmless(said) and SHOWN.replace(r"\r\n", "") not in said.splitlines()[0][:10]
    assert len(said) < 20_000 and "Traceback" in said
    assert r"\x1b]0;x\x07\x9b2J\u202e" in said.splitlines()[0] and ":bomb:" in said.splitlines()[0]


def test_bars_and_tables(monkeypatch):
    """Whatever is given to the consoles, not only what the commands give today."""
    stream = io.StringIO()
    made = console.LiteralConsole(file=stream, width=4000, force_terminal=True, color_system=None)
    table = console.table(EVIL, EVIL, caption=EVIL)
    table.add_row(EVIL)
    made.print(table)
    made.print(EVIL, style="bold")
    made.rule(EVIL)
    monkeypatch.setattr(console, "err", made)
    for in_bytes in (True, False):
        with console.bar(EVIL, in_bytes=in_bytes) as advance:
            advance(1, 1)
    text = re.sub(r"\x1b\[\??[0-9;]*[A-Za-z]", "", stream.getvalue()).replace("\r", "")  # rich's own
    assert harmless(text)
    assert text.count(SHOWN) >= 5 and "\N{BOMB}" not in text


def test_what_is_literal():
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = literal(everything)
    assert harmless(shown) and "\n" not in shown
    assert shown.isprintable() and "äß×→漢字😀 " in literal("äß×→漢字😀 ")
