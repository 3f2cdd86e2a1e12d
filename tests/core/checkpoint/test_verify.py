"""`verify`: what is right passes, and each thing that is wrong is named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fourbit
from fourbit.checkpoint import staging
from fourbit.checkpoint.dequantize import dequantize_checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.verify import verify_checkpoint
from fourbit.cli.app import app
from tests.folders import write_folder

SHARD = "model-00001-of-00007.safetensors"


@pytest.fixture
def folder(tmp_path):
    src = write_folder(tmp_path / "src")
    report = quantize_checkpoint(src, tmp_path / "dst", fourbit.QuantConfig(double_quant=True), max_shard_size=5000)
    assert SHARD in report.files
    return tmp_path / "dst"


def flip_weight(folder):
    data = bytearray((folder / SHARD).read_bytes())
    data[-1] ^= 1
    (folder / SHARD).write_bytes(data)
    return r"the bytes of '.*' are not those that were written"


def truncate(folder):
    with open(folder / SHARD, "r+b") as stream:
        stream.truncate(os.path.getsize(folder / SHARD) - 1)
    return "cannot be read as safetensors"


def remove_shard(folder):
    (folder / SHARD).unlink()
    return "is missing"


def change_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (folder / "config.json").write_text(json.dumps(config))
    return "is nf4, and config.json says fp4"


def remove_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    return "tokenizer.json is missing"


def change_index(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    return "does not list 'model.norm.weight'"


def add_tensor(folder):
    tensors = load_file(folder / SHARD)
    save_file({**tensors, "zzz": torch.zeros(2)}, folder / SHARD)
    return "'zzz' is not in the manifest"


def broken_manifest(folder):
    (folder / "fourbit_manifest.json").write_text('{"format": 1, "tensors": []}')
    return "tensors is missing or no object"


def path_trick(folder):
    listing = json.loads((folder / "fourbit_manifest.json").read_text())
    listing["files"]["../src/config.json"] = listing["files"]["config.json"]
    (folder / "fourbit_manifest.json").write_text(json.dumps(listing))
    return "is not a relative name within the folder"


FAULTS = (flip_weight, truncate, remove_shard, change_config, remove_tokenizer, change_index, add_tensor)


@pytest.mark.parametrize("harm", (*FAULTS, broken_manifest, path_trick), ids=lambda f: f.__name__)
def test_what_is_wrong_is_named(folder, harm):
    assert verify_checkpoint(folder).faults == ()
    wanted = harm(folder)
    result = CliRunner().invoke(app, ["verify", str(folder), "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and found["ok"] is False and found["manifest"] is True
    assert any(re.search(wanted, fault) for fault in found["faults"]), found["faults"]
    lines = CliRunner().invoke(app, ["verify", str(folder)])
    assert lines.exit_code == 1 and lines.stdout.count("fault: ") == len(found["faults"])


def plant(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"planted")


LOADED = ("modeling_own.py", "extra.safetensors", "pytorch_model.bin", "adapter_config.json", "sub/a.py", "vocab.txt")


@pytest.mark.parametrize("name", LOADED)
def test_planted_files_that_a_loader_reads_are_faults(folder, name):
    """Each hash is right and yet the folder is not what was written."""
    plant(folder, name)
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code == 1 and "every hash is right" not in result.stdout
    assert f"fault: {folder / name} is there, and the manifest does not know it" in result.stdout


def test_planted_shard(folder):
    """Another shard, though no index lists it, and a single file, which readers would take before the index."""
    save_file({"zzz": torch.zeros(2)}, folder / "model-00008-of-00007.safetensors")
    assert "model-00008-of-00007.safetensors is there, and the manifest" in verify_checkpoint(folder).faults[0]
    (folder / "model-00008-of-00007.safetensors").unlink()
    save_file({"zzz": torch.zeros(2)}, folder / "model.safetensors")
    assert "the tensor 'zzz' is not in the manifest" in " ".join(verify_checkpoint(folder).faults)


@pytest.mark.skipif(os.name == "nt", reason="POSIX links")
def test_planted_link(folder, tmp_path):
    (tmp_path / "code").mkdir()
    (folder / "code").symlink_to(tmp_path / "code")
    assert verify_checkpoint(folder).faults == (f"{folder / 'code'} is there, and the manifest does not know it",)


@pytest.mark.parametrize("name", ("README.md", "LICENSE", ".gitattributes", ".cache/huggingface", "plot.png"))
def test_planted_files_that_no_loader_reads_are_notes(folder, name):
    plant(folder, name)
    said = f"{folder / name} is there, and the manifest does not know it"
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code == 0 and f"note: {said}" in result.stdout and "every hash is right" in result.stdout
    found = json.loads(CliRunner().invoke(app, ["verify", str(folder), "--json"]).stdout)
    assert (found["ok"], found["faults"], found["notices"]) == (True, [], [said])


def test_a_folder_without_tensors(tmp_path):
    assert verify_checkpoint(write_folder(tmp_path / "src", {})).faults == ()


def test_what_is_right(folder):
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code == 0 and "every hash is right" in result.stdout
    keys = {"schema", "path", "ok", "manifest", "finished", "tensors", "quantized", "bytes", "faults", "notices"}
    assert set(json.loads(CliRunner().invoke(app, ["verify", str(folder), "--json"]).stdout)) == keys


def test_without_a_manifest(folder, tmp_path):
    (folder / "fourbit_manifest.json").unlink()
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code == 0 and "it has no manifest" in result.stdout
    packed, state = fourbit.quantize_4bit(torch.randn(64, 64))
    tensors = {"a.weight": packed, **state.to_state_dict("a.weight.")}
    save_file(tensors, tmp_path / "one.safetensors")
    found = verify_checkpoint(tmp_path / "one.safetensors")
    assert (found.ok, found.manifest, found.quantized) == (True, False, 1)
    tensors["a.weight.absmax"] = tensors["a.weight.absmax"][1:].clone()
    save_file(tensors, tmp_path / "one.safetensors")
    assert "absmax" in verify_checkpoint(tmp_path / "one.safetensors").faults[0]


def test_unfinished_folder_is_named(tmp_path):
    src = write_folder(tmp_path / "src")

    def stop(*step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(src, tmp_path / "dst", progress=stop)
    left = staging.unfinished_folder(tmp_path / "dst")
    for path in (tmp_path / "dst", left, left / "data"):
        found = verify_checkpoint(path)
        assert not found.ok and not found.finished and "is an unfinished folder" in found.faults[0]
        assert "`fourbit quantize --resume` continues it" in found.faults[0]
    (left / "journal.jsonl").unlink()
    assert "the command that began it, with --resume, continues it" in verify_checkpoint(left).faults[0]


def test_unfinished_folder_of_dequantize_is_named(folder, tmp_path):
    def stop(*step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dequantize_checkpoint(folder, tmp_path / "plain", progress=stop)
    assert "`fourbit dequantize --resume` continues it" in verify_checkpoint(tmp_path / "plain").faults[0]


INTERRUPTED_AT_20 = """
import importlib, os, runpy, signal, time
module = importlib.import_module("fourbit.checkpoint.quantize")
real, calls = module.quantize_4bit, []
def quantize_4bit(*args, **options):
    calls.append(1)
    if len(calls) == 20:
        os.kill(os.getpid(), signal.SIGINT)  # as the terminal does, at a moment that does not depend on speed
        time.sleep(5)  # ends at once in the main thread; another one must not be done before the signal is handled
    return real(*args, **options)
module.quantize_4bit = quantize_4bit
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
runpy.run_module("fourbit.cli", run_name="__main__")
"""


def test_control_c_and_resume(tmp_path):
    """SIGINT to the command: one line, status 130, and the run can be resumed."""
    tensors = {f"model.layers.{i}.q_proj.weight": torch.randn(1024, 1024) for i in range(40)}
    src = write_folder(tmp_path / "src", tensors)
    quantize_checkpoint(src, tmp_path / "want")
    arguments = ["quantize", str(src), str(tmp_path / "dst")]
    command = [sys.executable, "-m", "fourbit.cli", *arguments]
    interrupted = [sys.executable, "-c", INTERRUPTED_AT_20, *arguments]
    child = subprocess.run(interrupted, capture_output=True, text=True, timeout=60)
    assert (child.returncode, child.stdout) == (130, "")
    assert child.stderr == "error: interrupted; the same command with --resume continues\n"
    assert not (tmp_path / "dst").exists()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "resumed: an earlier run had done" in done.stderr
    for path in (tmp_path / "want").iterdir():
        assert (tmp_path / "dst" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_file_size_limit(tmp_path):
    """The system itself refuses to write on, as with a full disk: one line, and nothing under the final name."""
    src = write_folder(tmp_path / "src", {f"a.{i}.q_proj.weight": torch.randn(256, 1024) for i in range(8)})
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))\n"
        "from fourbit.cli.app import app; app(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, "quantize", str(src), str(tmp_path / "dst")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr and "--resume continues" in done.stderr
    assert not (tmp_path / "dst").exists()
    report = quantize_checkpoint(src, tmp_path / "dst", resume=True)
    assert report.resumed_bytes and verify_checkpoint(tmp_path / "dst").ok
