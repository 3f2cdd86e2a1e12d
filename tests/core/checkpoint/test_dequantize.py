"""Dequantizing a folder: the values, what is carried over, and that nothing is left when it goes wrong."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourbit
from fourbit.checkpoint import Checkpoint, CheckpointError, staging
from fourbit.checkpoint.dequantize import dequantize_checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.verify import verify_checkpoint
from tests.folders import QUANTIZED, sample_tensors, write_folder


@pytest.fixture
def packed(tmp_path):
    """A 4-bit folder with every kind of tensor."""
    src = write_folder(tmp_path / "src", shards=2)
    quantize_checkpoint(src, tmp_path / "packed", fourbit.QuantConfig(double_quant=True), max_shard_size=9000)
    return tmp_path / "packed"


@pytest.mark.parametrize("dtype", (None, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("max_shard_size", (10**9, 9000))
def test_values(packed, tmp_path, dtype, max_shard_size):
    tensors = sample_tensors()
    seen = []
    report = dequantize_checkpoint(
        *(packed, tmp_path / "dst"),
        dtype=dtype,
        max_shard_size=max_shard_size,
        progress=lambda *step: seen.append(step),
    )
    assert set(report.dequantized) == set(QUANTIZED) and set(report.carried) == set(tensors) - set(QUANTIZED)
    assert (len(report.files) == 1) == (max_shard_size == 10**9)
    assert seen[-1][1] == seen[-1][2] == report.bytes_before
    with Checkpoint(tmp_path / "dst") as written, Checkpoint(packed) as source:
        assert set(written.entries) == set(tensors) and not written.quantized()
        assert report.bytes_after == written.nbytes and report.bytes_before == source.nbytes
        for name, tensor in tensors.items():
            found = written.read(name)
            if name in QUANTIZED:
                want = fourbit.dequantize_4bit(*source.read_4bit(name), dtype=dtype)
                assert found.dtype == (dtype or tensor.dtype) and found.shape == tensor.shape
                assert torch.equal(found, want)
            else:
                assert torch.equal(found, tensor)
    assert sorted(os.listdir(tmp_path)) == ["dst", "packed", "src"]


def test_config_and_other_files(packed, tmp_path):
    (packed / "vocab.txt").write_text("a")
    report = dequantize_checkpoint(packed, tmp_path / "dst")
    assert json.loads((tmp_path / "dst" / "config.json").read_text()) == {"model_type": "llama", "hidden_size": 33}
    assert {"tokenizer.json", "vocab.txt"} <= set(report.copied) and not report.left_out


def test_same_bytes_twice_and_aligned(packed, tmp_path):
    for name in ("a", "b"):
        dequantize_checkpoint(packed, tmp_path / name)
    data = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert data == (tmp_path / "b" / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__")
    loaded = load_file(tmp_path / "a" / "model.safetensors")
    for name, entry in header.items():
        assert entry["data_offsets"][0] % loaded[name].dtype.itemsize == 0


def test_back_and_forth_is_stable(packed, tmp_path):
    """Quantizing what was dequantized gives the same weights again, to float32 where nothing is rounded."""
    dequantize_checkpoint(packed, tmp_path / "plain", dtype=torch.float32)
    quantize_checkpoint(tmp_path / "plain", tmp_path / "again", fourbit.QuantConfig())
    with Checkpoint(packed) as one, Checkpoint(tmp_path / "again") as two:
        for name in QUANTIZED:
            a = fourbit.dequantize_4bit(*one.read_4bit(name), dtype=torch.float32)
            b = fourbit.dequantize_4bit(*two.read_4bit(name), dtype=torch.float32)
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_single_file(tmp_path):
    packed, state = fourbit.quantize_4bit(torch.randn(7, 33))
    save_file({"w": packed, **state.to_state_dict("w.")}, tmp_path / "a.safetensors")
    dequantize_checkpoint(tmp_path / "a.safetensors", tmp_path / "dst")
    assert sorted(os.listdir(tmp_path / "dst")) == ["fourbit_manifest.json", "model.safetensors"]


def test_plain_source(tmp_path):
    src = write_folder(tmp_path / "src")
    with pytest.raises(CheckpointError, match="has no 4-bit weight in the bitsandbytes layout$"):
        dequantize_checkpoint(src, tmp_path / "dst")
    (src / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="its config.json says gptq"):
        dequantize_checkpoint(src, tmp_path / "dst")
    assert os.listdir(tmp_path) == ["src"]


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), 1e30))
def test_non_finite_leaves_nothing(tmp_path, bad):
    w = torch.randn(4, 64).half()
    w[2, 0] = 4  # an element whose code is that of zero would stay zero, whatever the scale
    packed, state = fourbit.quantize_4bit(w)
    state.absmax[2] = bad
    save_file({"w": packed, **state.to_state_dict("w.")}, tmp_path / "a.safetensors")
    with pytest.raises(fourbit.NonFiniteError, match=r"^w has a non-finite value .* index \[2, 0\] after dequantizing"):
        dequantize_checkpoint(tmp_path / "a.safetensors", tmp_path / "dst")
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_destination(packed, tmp_path):
    dst = tmp_path / "dst"
    dequantize_checkpoint(packed, dst)
    with pytest.raises(CheckpointError, match="exists already"):
        dequantize_checkpoint(packed, dst)
    dequantize_checkpoint(packed, dst, overwrite=True)
    for bad in (packed, tmp_path, packed / "inside"):
        with pytest.raises(CheckpointError, match="the destination"):
            dequantize_checkpoint(packed, bad, overwrite=True)


def test_interrupted_and_resumed(packed, tmp_path):
    """What is there after an interruption is no finished folder, and resuming gives the same bytes."""

    def interrupt(name, done, total):
        if done > total // 4:
            raise KeyboardInterrupt

    dst = tmp_path / "dst"
    with pytest.raises(KeyboardInterrupt):
        dequantize_checkpoint(packed, dst, progress=interrupt, max_shard_size=9000)
    assert not dst.exists() and staging.unfinished_folder(dst).is_dir()
    with pytest.raises(CheckpointError, match="an unfinished run"):
        dequantize_checkpoint(packed, dst, max_shard_size=9000)
    with pytest.raises(CheckpointError, match="dequantize is float32, was the stored types"):
        dequantize_checkpoint(packed, dst, resume=True, dtype=torch.float32, max_shard_size=9000)
    report = dequantize_checkpoint(packed, dst, resume=True, max_shard_size=9000)
    assert 0 < report.resumed_bytes <= report.bytes_before  # some may be written by the time it stops
    dequantize_checkpoint(packed, tmp_path / "whole", max_shard_size=9000)
    for file in sorted(os.listdir(dst)):
        assert (dst / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["dst", "packed", "src", "whole"]
    assert verify_checkpoint(dst).ok
