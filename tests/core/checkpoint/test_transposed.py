"""Folders with transformers' Conv1D: 4-bit weights are [out, in], plain ones [in, out], and no file says which."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourbit
from fourbit.checkpoint import Checkpoint, CheckpointError
from fourbit.checkpoint.compare import compare_checkpoints
from fourbit.checkpoint.compound import Compound
from fourbit.checkpoint.dequantize import dequantize_checkpoint
from fourbit.checkpoint.plan import transposed
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.verify import verify_checkpoint
from fourbit.nn import Conv1D4bit
from tests.core.conv1d import gpt2
from tests.folders import contents, folder_of

CONFIG = fourbit.QuantConfig(blocksize=64)
CONV1D = ("h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight")
GPT2 = {"model_type": "gpt2"}


@pytest.fixture
def folders(tmp_path):
    folder_of(gpt2(), tmp_path / "plain", GPT2)
    quantize_checkpoint(tmp_path / "plain", tmp_path / "small", CONFIG)
    return tmp_path


def test_it_is_written_as_memory_has_it(folders):
    model = fourbit.quantize_model(gpt2(), CONFIG)
    assert transposed(Compound(folders / "small")) == set(CONV1D)
    with Checkpoint(folders / "small") as checkpoint:
        assert set(checkpoint.quantized()) == {*CONV1D, "action.weight"}
        for name in checkpoint.quantized():
            layer = model.get_submodule(name.rpartition(".")[0])
            packed, state = checkpoint.read_4bit(name)
            assert state.shape == layer.weight_shape and torch.equal(packed.flatten(), layer.qweight.flatten()), name
            assert isinstance(layer, Conv1D4bit) == (name in CONV1D)
    assert verify_checkpoint(folders / "small").ok


def test_dequantized_it_is_as_it_was(folders):
    dequantize_checkpoint(folders / "small", folders / "back")
    source, back = (load_file(folders / name / "model.safetensors") for name in ("plain", "back"))
    model = fourbit.quantize_model(gpt2(), CONFIG)
    for name, tensor in source.items():
        assert back[name].shape == tensor.shape, name
        if name in CONV1D:
            layer = model.get_submodule(name.rpartition(".")[0])
            assert torch.equal(back[name], layer.dequantize().T) and back[name].is_contiguous()
    assert contents(folders / "back")["config.json"] == b'{\n  "model_type": "gpt2"\n}\n'


@pytest.mark.parametrize("config", ("both", "one"))
def test_compared_it_is_turned(folders, config):
    if config == "one":
        (folders / "plain" / "config.json").unlink()
    for a, b in (("plain", "small"), ("small", "plain")):
        found = compare_checkpoints(folders / a, folders / b)
        assert not found.errors and not found.only_in_a
        assert {t.name for t in found.tensors if not t.identical} == {*CONV1D, "action.weight"}
        assert all(15 < t.sqnr_db < 30 for t in found.tensors if not t.identical)
    same = compare_checkpoints(folders / "small", folders / "small")
    assert all(t.identical for t in same.tensors)


def test_an_unfinished_run_goes_on(folders, monkeypatch):
    whole, seen = contents(folders / "small"), []

    def stop(name, done, total):
        seen.append(name)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(folders / "plain", folders / "other", CONFIG, progress=stop)
    report = quantize_checkpoint(folders / "plain", folders / "other", CONFIG, resume=True)
    assert report.resumed_bytes and contents(folders / "other").keys() == whole.keys()
    assert contents(folders / "other")["model.safetensors"] == whole["model.safetensors"]
    # a run that knew no better would have done the square one the other way round, in the same layout
    monkeypatch.setattr("fourbit.checkpoint.plan.is_transposed", lambda model_type, module: False)
    with pytest.raises(CheckpointError, match="exists"):
        quantize_checkpoint(folders / "plain", folders / "other", CONFIG, resume=True)


def test_as_one_of_several_models(tmp_path):
    """A text encoder of a pipeline, beside a model whose layers of the same names are others."""
    (tmp_path / "src").mkdir()
    for folder, config in (("text_encoder", GPT2), ("transformer", {"model_type": "gpt_bigcode"})):
        folder_of(gpt2(), tmp_path / "src" / folder, config)
    index = {"_class_name": "Pipeline", **dict.fromkeys(("text_encoder", "transformer"), ["transformers", "Model"])}
    (tmp_path / "src" / "model_index.json").write_text(json.dumps(index))
    planned = quantize_checkpoint(tmp_path / "src", tmp_path / "4", CONFIG).plan
    assert {t.name for t in planned.quantized if t.transposed} == {f"text_encoder/{name}" for name in CONV1D}
    assert all(t.modules == (t.module,) and t.name == f"{t.module}.weight" for t in planned.quantized)
    dequantize_checkpoint(tmp_path / "4", tmp_path / "back")
    found = compare_checkpoints(tmp_path / "src", tmp_path / "4")
    assert not found.errors and all(t.identical or t.sqnr_db > 15 for t in found.tensors)
    for folder in ("text_encoder", "transformer"):
        source, back = (load_file(tmp_path / place / folder / "model.safetensors") for place in ("src", "back"))
        assert {n: t.shape for n, t in source.items()} == {n: t.shape for n, t in back.items()}
        assert all((back[n] - t).norm() < 0.2 * t.norm() for n, t in source.items())


@pytest.mark.parametrize(
    ("model_type", "name", "turned"),
    (
        ("gpt2", "transformer.h.0.attn.c_attn.weight", True),
        ("openai-gpt", "h.0.mlp.c_fc.weight", True),
        ("imagegpt", "transformer.h.0.crossattention.q_attn.weight", True),
        ("decision_transformer", "encoder.h.0.attn.c_proj.weight", True),
        ("clvp", "speech_decoder_model.model.decoder.layers.0.mlp.c_fc.weight", True),
        ("decision_transformer", "predict_state.weight", False),  # nn.Linear, as the next
        ("gpt_bigcode", "transformer.h.0.attn.c_attn.weight", False),
        ("llama", "model.layers.0.c_proj.weight", False),
        (["gpt2"], "h.0.attn.c_attn.weight", False),
    ),
)
def test_by_names_alone(tmp_path, model_type, name, turned):
    folder_of(torch.nn.Module(), tmp_path / "f", {"model_type": model_type})
    save_file({name: torch.randn(64, 128)}, tmp_path / "f" / "model.safetensors")
    (planned,) = fourbit.plan(tmp_path / "f").quantized
    assert planned.transposed == turned and planned.shape_in_4bit == ((128, 64) if turned else (64, 128))
