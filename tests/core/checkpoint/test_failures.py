"""Quantizing a folder when something is wrong: a clear error, and nothing left behind or lost."""

from __future__ import annotations

import json
import os

import pytest
import torch

import fourbit
from fourbit.checkpoint import Checkpoint, CheckpointError, staging
from fourbit.checkpoint import quantize as module
from fourbit.checkpoint.inspect import inspect_checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from tests.folders import QUANTIZED, sample_tensors, write_folder


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), float("-inf")))
def test_non_finite_leaves_nothing(tmp_path, bad):
    tensors = sample_tensors()
    tensors[QUANTIZED[1]][3, 5] = bad
    src = write_folder(tmp_path / "src", tensors)
    with pytest.raises(fourbit.NonFiniteError, match=rf"{QUANTIZED[1]} has a non-finite value .* index \[3, 5\]"):
        quantize_checkpoint(src, tmp_path / "dst")
    assert os.listdir(tmp_path) == ["src"]


def test_non_finite_where_nothing_is_quantized_is_kept(tmp_path):
    tensors = sample_tensors()
    tensors["model.norm.weight"][0] = float("-inf")
    src = write_folder(tmp_path / "src", tensors)
    quantize_checkpoint(src, tmp_path / "dst")
    assert Checkpoint(tmp_path / "dst").read("model.norm.weight")[0] == float("-inf")


def test_interrupted_leaves_no_destination(tmp_path):
    src = write_folder(tmp_path / "src")

    def interrupt(name, done, total):
        assert [name for name in os.listdir(tmp_path) if name.endswith(staging.UNFINISHED)]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(src, tmp_path / "dst", progress=interrupt)
    assert sorted(os.listdir(tmp_path)) == [".dst.unfinished", "src"]


def test_existing_destination(tmp_path):
    src, dst = write_folder(tmp_path / "src"), tmp_path / "dst"
    quantize_checkpoint(src, dst)
    before = (dst / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        quantize_checkpoint(src, dst, fourbit.QuantConfig("fp4"))
    assert (dst / "model.safetensors").read_bytes() == before
    quantize_checkpoint(src, dst, fourbit.QuantConfig("fp4"), overwrite=True)
    assert {t.type for t in inspect_checkpoint(dst).tensors if t.is_4bit} == {"fp4"}
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]


def test_failed_overwrite_keeps_the_old_one(tmp_path):
    src, dst = write_folder(tmp_path / "src"), tmp_path / "dst"
    quantize_checkpoint(src, dst)
    before = (dst / "model.safetensors").read_bytes()
    tensors = sample_tensors()
    tensors[QUANTIZED[0]][0, 0] = float("nan")
    with pytest.raises(fourbit.NonFiniteError):
        quantize_checkpoint(write_folder(tmp_path / "bad", tensors), dst, overwrite=True)
    assert (dst / "model.safetensors").read_bytes() == before


def test_overwrite_spares_what_is_no_model(tmp_path):
    src, home = write_folder(tmp_path / "src"), tmp_path / "home"
    home.mkdir()
    (home / "letters.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="holds something else than a model"):
        quantize_checkpoint(src, home, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not a folder"):
        quantize_checkpoint(src, tmp_path / "file", overwrite=True)
    assert (home / "letters.txt").read_text() == "dear"


def test_source_and_destination_must_be_apart(tmp_path):
    src = write_folder(tmp_path / "src")
    (tmp_path / "link").symlink_to(src)
    for dst in (src, tmp_path / "link", tmp_path, src / "..", tmp_path / "link" / "new", src / "new"):
        with pytest.raises(CheckpointError, match="destination .* (is|inside) the source"):
            quantize_checkpoint(src, dst, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["link", "src"]
    assert "new" not in os.listdir(src)


def test_already_quantized(tmp_path):
    src = write_folder(tmp_path / "src")
    quantize_checkpoint(src, tmp_path / "dst")
    with pytest.raises(CheckpointError, match="quantized already: .* is a 4-bit weight"):
        quantize_checkpoint(tmp_path / "dst", tmp_path / "again")
    (src / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="quantized already: its config.json says gptq"):
        quantize_checkpoint(src, tmp_path / "again")


def test_name_that_is_taken(tmp_path):
    tensors = sample_tensors()
    tensors[QUANTIZED[0] + ".absmax"] = torch.zeros(3)
    src = write_folder(tmp_path / "src", tensors)
    with pytest.raises(CheckpointError, match=r"the name '.*absmax' is needed"):
        quantize_checkpoint(src, tmp_path / "dst")
    assert os.listdir(tmp_path) == ["src"]


def test_destination_that_cannot_be_written(tmp_path, monkeypatch):
    src = write_folder(tmp_path / "src")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write in .*file"):
        quantize_checkpoint(src, tmp_path / "file" / "dst")
    readonly = tmp_path / "readonly"
    readonly.mkdir()
    readonly.chmod(0o500)
    try:
        if os.access(readonly, os.W_OK):  # root may write everywhere
            monkeypatch.setattr(staging.Path, "mkdir", _denied)
        with pytest.raises(CheckpointError, match="cannot write in .*readonly: Permission denied"):
            quantize_checkpoint(src, readonly / "dst")
    finally:
        monkeypatch.undo()
        readonly.chmod(0o700)
    assert os.listdir(readonly) == []


def _denied(*args, **kwargs):
    raise PermissionError(13, "Permission denied")


def test_full_disk(tmp_path, monkeypatch):
    src = write_folder(tmp_path / "src")
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match="has 1,000 bytes free, and .* are needed"):
        quantize_checkpoint(src, tmp_path / "dst")
    assert os.listdir(tmp_path) == ["src"]


def test_wrong_result_is_not_put_in_place(tmp_path, monkeypatch):
    """If a weight came out with other sizes than planned, the writer says so and nothing is left."""
    src = write_folder(tmp_path / "src")
    real = module.quantize_4bit

    def short(w, **options):
        packed, state = real(w, **options)
        return packed[:-1], state

    monkeypatch.setattr(module, "quantize_4bit", short)
    with pytest.raises(CheckpointError, match="want torch.uint8"):
        quantize_checkpoint(src, tmp_path / "dst")
    assert os.listdir(tmp_path) == ["src"]
