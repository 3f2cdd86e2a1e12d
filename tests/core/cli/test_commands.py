"""The commands, run in this process: what they print, and their exit status."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib import metadata

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import fourbit
from fourbit import plugins, registry
from fourbit.checkpoint import Checkpoint
from fourbit.cli import console
from fourbit.cli.app import GROUP, app
from tests.folders import QUANTIZED, sample_tensors, write_folder


def run(*arguments, env=None):
    return CliRunner().invoke(app, [str(a) for a in arguments], env=env, prog_name="fourbit")


def ok(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def src(tmp_path):
    return write_folder(tmp_path / "src", shards=2)


@pytest.fixture
def large(tmp_path):
    """A folder with a large tensor that no rule knows."""
    tensors = {"model.layers.0.odd_bank": torch.zeros(1024, 1100).bfloat16(), "a.q_proj.weight": torch.randn(8, 64)}
    return write_folder(tmp_path / "large", tensors)


def test_quantize(src, tmp_path):
    result = ok("quantize", src, tmp_path / "dst", "--double-quant", "--blocksize", "32")
    assert "nf4, blocksize 32, double-quantized" in result.stdout and "whole model" in result.stdout
    assert result.stderr == ""  # no bars where stderr is no terminal
    with Checkpoint(tmp_path / "dst") as written:
        assert set(written.quantized()) == set(QUANTIZED)
        state = written.state(QUANTIZED[0])
        assert (state.quant_type, state.blocksize, state.double_quant) == ("nf4", 32, True)


def test_quantize_json_and_options(src, tmp_path):
    arguments = ("--quant-type", "fp4", "--no-double-quant", "--compute-dtype", "float16", "--skip", "q_proj")
    result = ok("quantize", src, tmp_path / "dst", *arguments, "--skip", "*.experts", "--device", "cpu", "--json")
    value = json.loads(result.stdout)
    assert value["dry_run"] is False and value["bytes_after"] < value["bytes_before"]
    actions = {t["name"]: (t["action"], t["rule"]) for t in value["plan"]["tensors"]}
    assert actions[QUANTIZED[0]] == ("skip", "skip_modules: q_proj")
    assert actions[QUANTIZED[1]][0] == "quantize"
    entry = Checkpoint(tmp_path / "dst").config["quantization_config"]
    assert entry["bnb_4bit_compute_dtype"] == "float16" and entry["bnb_4bit_quant_type"] == "fp4"


def test_dry_run_writes_nothing(src, tmp_path):
    result = ok("quantize", src, tmp_path / "dst", "--dry-run")
    assert "layers as described by names (its config.json names no class that a plugin knows)" in result.stdout
    assert "nothing was written" in result.stdout
    for name in sample_tensors():
        assert name in result.stdout
    value = json.loads(ok("quantize", src, tmp_path / "dst", "--dry-run", "--json").stdout)
    assert value["dry_run"] is True and value["quantized_parameters"] > 0
    real = json.loads(ok("quantize", src, tmp_path / "real", "--json").stdout)
    assert value["bytes_written"] == real["bytes_after"]
    shutil.rmtree(tmp_path / "real")
    assert os.listdir(tmp_path) == ["src"]
    assert run("quantize", src, src, "--dry-run").exit_code == 1


def test_a_large_tensor_left_in_16_bit_cannot_be_missed(large, tmp_path):
    for extra in (["--dry-run"], ["--dry-run", "--json"], [], ["--json", "--overwrite"]):
        result = ok("quantize", large, tmp_path / "dst", *extra)
        assert "WARNING" in result.stderr
        assert "model.layers.0.odd_bank 1024×1100 STAYS IN 16 BIT: 2,252,800 bytes" in result.stderr
        if "--json" in extra:
            value = json.loads(result.stdout)
            assert value.get("plan", value)["large_left"] == ["model.layers.0.odd_bank"]


def test_nothing_to_quantize_is_an_error(tmp_path):
    src = write_folder(tmp_path / "src", {"norm.weight": torch.ones(8), "a.conv.weight": torch.ones(2, 2, 3, 3)})
    for extra in ([], ["--dry-run"], ["--json"]):
        result = run("quantize", src, tmp_path / "dst", *extra)
        assert result.exit_code == 1
        assert "no tensor is quantized" in result.stderr
        assert "1 convolution; 1 not a matrix (norm, bias or scalar)" in result.stderr
        assert ("norm.weight" in result.stdout) == (extra == ["--dry-run"])  # the plan says why
    assert os.listdir(tmp_path) == ["src"]


def test_errors_are_one_line(src, tmp_path):
    assert run("quantize", src, src).exit_code == 1
    result = run("quantize", tmp_path / "nothing", tmp_path / "dst")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: {tmp_path / 'nothing'} does not exist\n"
    tensors = sample_tensors()
    tensors[QUANTIZED[0]][1, 2] = float("nan")
    result = run("quantize", write_folder(tmp_path / "bad", tensors), tmp_path / "dst", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {QUANTIZED[0]} has a non-finite value (nan) at index [1, 2]")
    assert sorted(os.listdir(tmp_path)) == ["bad", "src"]


def test_tracebacks_on_request(tmp_path):
    for result in (
        run("--debug", "inspect", tmp_path / "nothing"),
        run("inspect", tmp_path / "nothing", env={"FOURBIT_DEBUG": "1"}),
    ):
        assert isinstance(result.exception, fourbit.checkpoint.CheckpointError)
    assert isinstance(run("inspect", tmp_path / "nothing").exception, SystemExit)


@pytest.mark.parametrize(
    "arguments",
    (
        ("--blocksize", "33"),
        ("--blocksize", "x"),
        ("--quant-type", "nf5"),
        ("--compute-dtype", "int8"),
        ("--device", "toaster"),
        ("--no-such-option",),
    ),
)
def test_usage_errors(src, tmp_path, arguments):
    result = run("quantize", src, tmp_path / "dst", *arguments)
    assert result.exit_code == 2 and arguments[0].strip("-")[:5] in result.stderr
    assert os.listdir(tmp_path) == ["src"]


def test_inspect(src, tmp_path):
    ok("quantize", src, tmp_path / "dst", "--double-quant")
    value = json.loads(ok("inspect", tmp_path / "dst", "--json").stdout)
    by_name = {t["name"]: t for t in value["tensors"]}
    assert set(by_name) == set(sample_tensors())
    found = by_name[QUANTIZED[3]]
    assert (found["type"], found["shape"], found["blocksize"]) == ("nf4", [3, 10, 33], 64)
    assert value["kind"].startswith("4-bit") and value["quantized_parameters"] == 28613
    text = ok("inspect", tmp_path / "dst").stdout
    assert QUANTIZED[0] in text and "nf4 dq" in text
    plain = json.loads(ok("inspect", src, "--json").stdout)
    assert plain["kind"].startswith("plain") and plain["bits_per_quantized_parameter"] == 0


def test_names_of_strangers_are_printed_harmlessly(tmp_path):
    save_file({"[red]\x1b[2Jx[/nonsense]": torch.zeros(2)}, tmp_path / "a.safetensors")
    text = ok("inspect", tmp_path / "a.safetensors").stdout
    assert "\x1b" not in text and "[red]" in text and "[/nonsense]" in text


def test_backends():
    value = json.loads(ok("backends", "--json").stdout)
    assert {b["name"]: b["state"] for b in value["backends"]}["reference"] == "ready"
    assert "reference" in ok("backends").stdout


def test_backends_that_failed(monkeypatch):
    trace = "Traceback (most recent call last):\n  boom\nImportError: no [driver]"
    broken = registry.BackendInfo("toy", "failed", "ImportError: no [driver]", traceback=trace)
    monkeypatch.setattr(plugins, "backends", lambda: [broken])
    assert "Traceback" not in ok("backends").stdout and "-v" in run("backends").stderr
    assert "no [driver]" in ok("backends").stdout
    assert trace in ok("backends", "-v").stdout


def test_estimate_of_a_number():
    value = json.loads(ok("estimate", "--params", "70e9", "--json").stdout)
    bits = {(e["quant_type"], e["blocksize"], e["double_quant"]): e["bits_per_parameter"] for e in value["settings"]}
    assert len(bits) == len(value["settings"]) and {blocksize for _, blocksize, _ in bits} == {
        2**i for i in range(5, 13)
    }
    for quant_type in ("nf4", "fp4"):
        assert bits[quant_type, 64, False] == 4.5
        assert round(bits[quant_type, 64, True], 6) == 4.126953
        assert round(bits[quant_type, 128, True], 6) == 4.063477
        assert bits[quant_type, 128, False] == 4.25
    text = ok("estimate", "--params", "70e9").stdout
    assert all(number in text for number in ("4.500000", "4.126953", "4.063477", "39,375,000,000"))


@pytest.mark.parametrize(("text", "count"), (("7B", 7 * 10**9), ("135M", 135_000_000), ("1_000", 1000), ("1.5k", 1500)))
def test_counts(text, count):
    assert json.loads(ok("estimate", "--params", text, "--json").stdout)["quantized_parameters"] == count


def test_estimate_of_a_folder(src, tmp_path):
    value = json.loads(ok("estimate", src, "--json").stdout)
    report = json.loads(ok("quantize", src, tmp_path / "dst", "--double-quant", "--json").stdout)["plan"]
    setting = next(e for e in value["settings"] if e["blocksize"] == 64 and e["double_quant"])
    assert setting["bytes"] == report["bytes_after"] == setting["quantized_bytes"] + setting["other_bytes"]
    assert setting["bits_per_parameter"] == pytest.approx(report["bits_per_parameter"])
    assert value["quantized_parameters"] == report["quantized_parameters"]
    assert "that stay as they are" in ok("estimate", src).stdout
    assert run("estimate", tmp_path / "dst").exit_code == 1


@pytest.mark.parametrize(
    "arguments", ((), ("x", "--params", "7B"), *(("--params", p) for p in ("", "0", "-3", "x", "1e99")))
)
def test_estimate_usage(arguments):
    assert run("estimate", *arguments).exit_code == 2


def entry_points(monkeypatch, tmp_path, **commands):
    """As if distributions had installed these commands; NAME="module:function"."""
    found = [metadata.EntryPoint(name, value, GROUP) for name, value in commands.items()]
    monkeypatch.setattr(metadata, "entry_points", lambda group: [ep for ep in found if ep.group == group])
    monkeypatch.syspath_prepend(tmp_path)


def test_commands_of_plugins(monkeypatch, tmp_path):
    """One that is broken, by whatever it raises, is listed too, and takes nothing from the others."""
    (tmp_path / "good_plugin.py").write_text(
        "import typer\n"
        "def greet(name: str, loud: bool = False) -> None:\n"
        "    '''Say\n    hello.'''\n"
        "    if name == 'nobody': raise ValueError('nobody is there')\n"
        "    print(name.upper() if loud else name)\n"
    )
    (tmp_path / "bad_plugin.py").write_text("raise SystemExit('no [driver]')\n")
    plugins = {"greet": "good_plugin:greet", "bad": "bad_plugin:run", "gone": "no_such_plugin:run"}
    entry_points(monkeypatch, tmp_path, **plugins, odd="good_plugin:typer", inspect="bad_plugin:run")
    assert "quantize" in ok("quantize", "--help").stdout and not {"good_plugin", "bad_plugin"} & set(sys.modules)
    shown = ok("--help").stdout
    assert "Say hello." in shown and all(name in shown for name in ("quantize", "bad", "gone", "odd"))
    assert ok("greet", "you", "--loud").stdout == "YOU\n"
    assert "hello" in ok("greet", "--help").stdout and run("greet").exit_code == 2
    assert run("greet", "nobody").stderr == "error: nobody is there\n"
    for name, reason in (("bad", "SystemExit: no [driver]"), ("gone", "ModuleNotFoundError: No module named ")):
        result = run(name, "x", "--any", "option")
        assert (result.exit_code, result.stdout) == (1, "")
        assert f"error: the command {name} ({plugins[name]}) cannot be imported: {reason}" in result.stderr
    assert run("odd").exit_code == 1 and run("inspect", tmp_path).stderr.startswith(f"error: {tmp_path} has no")
    assert "Did you mean" in run("gret").stderr


def test_sizes_for_people():
    assert [console.size(n) for n in (5, 1500, 269_060_552, 7e12)] == ["5 B", "1.5 kB", "269.1 MB", "7.0 TB"]
    assert console.shape(()) == "scalar"
