"""Quantizing a folder: what is written, and that nothing is when it goes wrong."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourbit
from fourbit.checkpoint import Checkpoint
from fourbit.checkpoint.inspect import inspect_checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.state import quantized_nbytes
from tests.folders import QUANTIZED, sample_tensors, write_folder

CONFIGS = [
    fourbit.QuantConfig(quant_type, blocksize, double_quant)
    for quant_type in ("nf4", "fp4")
    for blocksize in (32, 64, 4096)
    for double_quant in (False, True)
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.quant_type}-{c.blocksize}-{c.double_quant}")
@pytest.mark.parametrize("shards", (1, 3))
def test_what_is_written(tmp_path, config, shards):
    tensors = sample_tensors()
    src = write_folder(tmp_path / "src", tensors, shards)
    seen = []
    report = quantize_checkpoint(
        src,
        tmp_path / "dst",
        config,
        progress=lambda *step: seen.append(step),
        max_shard_size={1: 10**9, 3: 9000}[shards],
    )
    assert (len(report.files) == 1) == (shards == 1)
    with Checkpoint(tmp_path / "dst") as written:
        assert set(written.quantized()) == set(QUANTIZED)
        assert set(written.entries) - written.companions() == set(tensors)
        for name, tensor in tensors.items():
            if name not in QUANTIZED:
                assert torch.equal(written.read(name), tensor)
                continue
            packed, state = fourbit.quantize_4bit(
                tensor, quant_type=config.quant_type, blocksize=config.blocksize, double_quant=config.double_quant
            )
            packed_again, state_again = written.read_4bit(name)
            assert torch.equal(packed, packed_again)
            assert (state_again.shape, state_again.dtype) == (tensor.shape, tensor.dtype)
            for part, part_again in zip(state._tensors().values(), state_again._tensors().values(), strict=True):
                assert (part is None and part_again is None) or torch.equal(part, part_again)
    assert [step[1] for step in seen] == sorted(step[1] for step in seen)
    assert seen[-1][1] == seen[-1][2] == report.bytes_before == sum(t.nbytes for t in tensors.values())
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]
    assert not [name for name in os.listdir(tmp_path / "dst") if name.endswith(".tmp")]


def test_every_tensor_is_aligned_and_readable_without_us(tmp_path):
    """No holes, no overlaps (safetensors checks that), every tensor at a multiple of its item size."""
    src = write_folder(tmp_path / "src")
    report = quantize_checkpoint(src, tmp_path / "dst", fourbit.QuantConfig(double_quant=True))
    for file in report.files:
        data = (tmp_path / "dst" / file).read_bytes()
        length = int.from_bytes(data[:8], "little")
        assert length % 8 == 0
        header = json.loads(data[8 : 8 + length])
        assert header.pop("__metadata__")["format"] == "pt"
        loaded = load_file(tmp_path / "dst" / file)
        for name, entry in header.items():
            assert entry["data_offsets"][0] % loaded[name].dtype.itemsize == 0


def test_config_json(tmp_path):
    src = write_folder(tmp_path / "src")
    config = fourbit.QuantConfig(double_quant=True, compute_dtype=torch.float16, skip_modules=("k_proj",))
    quantize_checkpoint(src, tmp_path / "dst", config)
    written = json.loads((tmp_path / "dst" / "config.json").read_text())
    entry = written.pop("quantization_config")
    assert written == json.loads((src / "config.json").read_text())
    skipped = entry.pop("llm_int8_skip_modules")
    assert {"lm_head", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.gate"} <= set(skipped)
    assert not any(name.endswith(("q_proj", "up_proj")) for name in skipped)
    assert entry == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float16",
        "bnb_4bit_quant_storage": "uint8",
        "fourbit": config.to_dict(),
    }


def test_tied_head_is_listed_though_it_has_no_tensor(tmp_path):
    tensors = sample_tensors()
    del tensors["lm_head.weight"]
    src = write_folder(tmp_path / "src", tensors)
    quantize_checkpoint(src, tmp_path / "dst")
    with Checkpoint(tmp_path / "dst") as written:
        assert "lm_head.weight" not in written.entries
        assert written.config["quantization_config"]["llm_int8_skip_modules"][0] == "lm_head"


def test_sizes_are_those_of_the_plan(tmp_path):
    src = write_folder(tmp_path / "src")
    report = quantize_checkpoint(src, tmp_path / "dst", fourbit.QuantConfig(blocksize=32, double_quant=True))
    found = inspect_checkpoint(tmp_path / "dst")
    planned = {t.name: t for t in report.plan.tensors}
    for t in found.tensors:
        assert t.nbytes == planned[t.name].bytes_after
        assert t.is_4bit == (t.name in QUANTIZED)
        if t.is_4bit:
            assert t.nbytes == quantized_nbytes(t.parameters, 32, True)
            assert (t.type, t.blocksize, t.double_quant) == ("nf4", 32, True)
            assert t.shape == planned[t.name].shape and t.dtype == str(planned[t.name].dtype)[6:]
    assert found.nbytes == report.bytes_after
    assert found.bits_per_quantized_parameter == pytest.approx(report.plan.bits_per_quantized_parameter)
    assert found.parameters == report.plan.parameters


def test_other_files(tmp_path):
    src = write_folder(tmp_path / "src")
    (src / "sub" / "deep").mkdir(parents=True)
    (src / "sub" / "deep" / "vocab.txt").write_text("a")
    (src / "pytorch_model.bin").write_bytes(b"x" * 100)
    (src / "consolidated.safetensors").write_bytes(b"x")
    (src / ".git").mkdir()
    (src / ".git" / "config").write_text("")
    (src / "link.txt").symlink_to(src / "tokenizer.json")
    report = quantize_checkpoint(src, tmp_path / "dst")
    assert set(report.copied) == {"tokenizer.json", "link.txt", os.path.join("sub", "deep", "vocab.txt")}
    assert set(report.left_out) == {"pytorch_model.bin", "consolidated.safetensors"}
    assert (tmp_path / "dst" / "sub" / "deep" / "vocab.txt").read_text() == "a"
    assert not (tmp_path / "dst" / "link.txt").is_symlink()
    assert not (tmp_path / "dst" / ".git").exists()


def test_same_bytes_twice(tmp_path):
    src = write_folder(tmp_path / "src", shards=2)
    for name in ("a", "b"):
        quantize_checkpoint(src, tmp_path / name, fourbit.QuantConfig(double_quant=True), max_shard_size=9000)
    for file in sorted(os.listdir(tmp_path / "a")):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_custom_codebook_under_its_own_name(tmp_path, monkeypatch):
    from fourbit import codebooks

    monkeypatch.setattr(codebooks, "_codebooks", dict(codebooks._codebooks))
    codebooks.register(codebooks.Codebook("int4_even", tuple((i - 7) / 8 for i in range(16))))
    src = write_folder(tmp_path / "src")
    quantize_checkpoint(src, tmp_path / "dst", fourbit.QuantConfig("int4_even"))
    with Checkpoint(tmp_path / "dst") as written:
        assert QUANTIZED[0] + ".quant_state.bitsandbytes__int4_even" in written.entries
        assert written.state(QUANTIZED[0]).quant_type == "int4_even"
        assert written.config["quantization_config"]["bnb_4bit_quant_type"] == "int4_even"


def test_single_file_source(tmp_path):
    save_file({"a.q_proj.weight": torch.randn(8, 64)}, tmp_path / "w.safetensors")
    report = quantize_checkpoint(tmp_path / "w.safetensors", tmp_path / "dst")
    assert report.copied == () and list(Checkpoint(tmp_path / "dst").quantized()) == ["a.q_proj.weight"]
