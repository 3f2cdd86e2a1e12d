"""Weight files of a given size: what sizes are, what is in a file, and that a plan of them is kept."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

import fourbit
from fourbit.checkpoint import Checkpoint, CheckpointError, file_layout, output
from fourbit.checkpoint.compare import compare_checkpoints
from fourbit.checkpoint.dequantize import dequantize_checkpoint
from fourbit.checkpoint.file_layout import parse_size
from fourbit.checkpoint.inspect import inspect_checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.reader import META_MARK
from fourbit.checkpoint.verify import verify_checkpoint
from fourbit.cli.app import app
from tests.folders import contents, sample_tensors, write_folder
from tests.support import installed

SIZES = {
    "5GB": 5 * 10**9,
    "500MB": 5 * 10**8,
    "2GiB": 2 * 2**30,
    " 1.5 kb ": 1500,
    "1KiB": 1024,
    "0.5MiB": 2**19,
    "3TB": 3 * 10**12,
    "10gb": 10**10,
}


@pytest.mark.parametrize(("text", "nbytes"), SIZES.items())
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes
    if installed("huggingface_hub") and "i" not in text:
        from huggingface_hub.serialization._base import parse_size_to_int

        assert parse_size_to_int(text) == nbytes


def test_sizes_in_bytes_and_none():
    assert (parse_size(7), parse_size(None)) == (7, 5 * 10**9)


BAD = ("", "5", "GB", "-1GB", "0GB", "0.0001KB", "5 G B", "5GBB", "1e3MB", "nanGB", "5ZB", "５GB", "1" * 13 + "GB")


@pytest.mark.parametrize("size", (*BAD, 0, -5, True, 1.5, b"5GB"))
def test_what_is_no_size(size, tmp_path):
    with pytest.raises(ValueError, match=r"max_shard_size .* is no size; want for example '5GB', '500MB' or '2GiB'"):
        quantize_checkpoint(tmp_path, tmp_path / "dst", max_shard_size=size)
    if isinstance(size, str):
        for command in ("quantize", "dequantize"):
            result = CliRunner().invoke(app, [command, "x", "y", f"--max-shard-size={size}"], env={"COLUMNS": "200"})
            assert result.exit_code == 2 and "--max-shard-size" in result.stderr and "is no size" in result.stderr


def shards_of(folder):
    """The names of the tensors in each weight file, in order."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            found[file.name] = set(stream.keys())
    return found


@pytest.mark.parametrize("size", ("1KB", "4KB", "12KB"))
@pytest.mark.parametrize("double_quant", (False, True))
def test_files_have_at_most_that_size(tmp_path, size, double_quant):
    src = write_folder(tmp_path / "src", shards=2)
    report = quantize_checkpoint(
        src, tmp_path / "4", fourbit.QuantConfig(double_quant=double_quant), max_shard_size=size
    )
    back = dequantize_checkpoint(tmp_path / "4", tmp_path / "16", max_shard_size=size)
    for folder, files in ((tmp_path / "4", report.files), (tmp_path / "16", back.files)):
        assert len(files) > 1
        assert files == tuple(f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1))
        found = shards_of(folder)
        assert tuple(found) == files
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for file, names in found.items() for name in names}
        checkpoint = Checkpoint(folder)
        assert index["metadata"]["total_size"] == checkpoint.nbytes
        for weight, companions in checkpoint.quantized().items():
            assert {index["weight_map"][name] for name in (weight, *companions)} == {index["weight_map"][weight]}
        for names in found.values():
            weights = [n for n in names if n not in checkpoint.companions()]
            data = sum(checkpoint.info(name).nbytes for name in names)
            assert data <= parse_size(size) or len(weights) == 1, (names, data)
        assert verify_checkpoint(folder).ok and inspect_checkpoint(folder).files == files
        assert not compare_checkpoints(src, folder).errors
    plain = {name: tensor for name, tensor in sample_tensors().items() if name in back.carried}
    with Checkpoint(tmp_path / "16") as read:
        assert all(torch.equal(read.read(name), tensor) for name, tensor in plain.items())


def test_the_command(tmp_path):
    src = write_folder(tmp_path / "src")
    for command, folder in (("quantize", "4"), ("dequantize", "16")):
        result = CliRunner().invoke(app, [command, str(src), str(tmp_path / folder), "--max-shard-size", "4KB"])
        assert result.exit_code == 0, result.output
        assert len(shards_of(tmp_path / folder)) > 3
        src = tmp_path / folder
    CliRunner().invoke(app, ["quantize", str(src), str(tmp_path / "whole")])
    assert list(shards_of(tmp_path / "whole")) == ["model.safetensors"]  # 5 GB where nobody says


def test_one_size_is_resumed_with_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "SYNC_SECONDS", 0)
    src, dst = write_folder(tmp_path / "src"), tmp_path / "dst"
    quantize_checkpoint(src, tmp_path / "want", max_shard_size="4KB")

    def interrupt(name, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(src, dst, max_shard_size="4KB", progress=interrupt)
    with pytest.raises(CheckpointError, match="cannot be resumed: the plan, or the size of weight files, is another"):
        quantize_checkpoint(src, dst, max_shard_size="8KB", resume=True)
    assert quantize_checkpoint(src, dst, max_shard_size="4KB", resume=True).resumed_bytes
    assert contents(dst) == contents(tmp_path / "want")


def test_more_files_than_can_be_numbered(tmp_path, monkeypatch):
    monkeypatch.setattr(file_layout, "MOST_SHARDS", 5)
    src = write_folder(tmp_path / "src")
    with pytest.raises(CheckpointError, match="files of 1 bytes would be 11, more than 5"):
        quantize_checkpoint(src, tmp_path / "dst", max_shard_size=1)
    assert not (tmp_path / "dst").exists()


def test_a_weight_and_its_state_are_in_one_file(tmp_path):
    src = write_folder(tmp_path / "src")
    quantize_checkpoint(src, tmp_path / "dst", fourbit.QuantConfig(double_quant=True), max_shard_size=1)
    for names in shards_of(tmp_path / "dst").values():
        states = {name.partition(META_MARK)[0] for name in names if META_MARK in name}
        assert len(states) <= 1 and states <= names
        assert len(names) == (6 if states else 1)
