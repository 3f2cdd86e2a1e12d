"""Which folders and files are taken for a model, and what becomes of their names and subfolders."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourbit.checkpoint import Checkpoint, CheckpointError
from fourbit.checkpoint.dequantize import dequantize_checkpoint
from fourbit.checkpoint.inspect import inspect_checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.verify import verify_checkpoint
from tests.folders import sample_tensors, write_folder


def integers(*shape, dtype):
    return torch.ones(*shape, dtype=dtype)


FOREIGN = {
    "GPTQ": {"q.qweight": integers(8, 64, dtype=torch.int32), "q.g_idx": integers(64, dtype=torch.int32)},
    "AWQ": {"q.qweight": integers(64, 8, dtype=torch.int32), "q.qzeros": integers(1, 8, dtype=torch.int32)},
    "MLX": {"q.weight": integers(64, 8, dtype=torch.uint32), "q.scales": torch.ones(64, 1), "q.biases": torch.ones(64)},
    "compressed-tensors": {"q.weight_packed": integers(64, 8, dtype=torch.int32), "q.weight_scale": torch.ones(64, 1)},
    "weight_scale_inv": {"q.weight": torch.ones(64, 64), "q.weight_scale_inv": torch.ones(1, 1)},
    "FP8": {"q.weight": torch.ones(64, 64).to(torch.float8_e4m3fn)},
    "torchao": {"q._weight_qdata": integers(64, 64, dtype=torch.int8), "q._weight_scale": torch.ones(64, 1)},
    "bitsandbytes in 8 bits": {"q.weight": integers(64, 64, dtype=torch.int8), "q.SCB": torch.ones(64)},
    "MXFP4": {
        "q.gate_up_proj_blocks": integers(2, 64, 2, 16, dtype=torch.uint8),
        "q.gate_up_proj_scales": integers(2, 64, 2, dtype=torch.uint8),
    },
    "HQQ": {"q.W_q": integers(64, 8, dtype=torch.uint8), "q.scale": torch.ones(64, 1)},
    "AQLM": {"q.codes": integers(64, 8, 1, dtype=torch.int16), "q.codebooks": torch.ones(1, 4, 1, 8)},
    "quanto": {"q.weight._data": integers(64, 64, dtype=torch.int8), "q.weight._scale": torch.ones(64, 1)},
    "integers with scales": {"q.weight": integers(64, 8, dtype=torch.uint8), "q.weight_scale": torch.ones(64, 1)},
}


@pytest.mark.parametrize("method", FOREIGN)
def test_quantized_by_others_is_known_by_its_tensors(tmp_path, method):
    """Also one such layer among many plain ones, and without a config.json."""
    save_file({**sample_tensors(), **FOREIGN[method]}, tmp_path / "model.safetensors", metadata={"format": "mlx"})
    with pytest.raises(CheckpointError, match=rf"is quantized already: its tensor 'q\..* is that of .*{method}"):
        quantize_checkpoint(tmp_path, tmp_path / "dst")
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert method in inspect_checkpoint(tmp_path).kind


@pytest.mark.parametrize(
    ("config", "method"),
    (
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"bits": 4}}, "MLX"),
        ({"compression_config": {"format": "pack-quantized"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"bits": 4}}, "an unnamed method"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
    ),
)
def test_quantized_by_others_is_known_by_its_config(tmp_path, config, method):
    src = write_folder(tmp_path / "src")
    (src / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"is quantized already: its config.json says {method}"):
        quantize_checkpoint(src, tmp_path / "dst")
    assert inspect_checkpoint(src).kind == f"quantized by {method}"


def test_what_only_looks_quantized(tmp_path):
    """Plain weights of mlx, integer masks, and a float weight with a scale of its own."""
    extra = {
        "a.bias": integers(1, 1, 8, 8, dtype=torch.uint8),  # GPT-2's mask
        "b.weight": torch.ones(8, 8),
        "b.weight_scale": torch.ones(8),
        "b.scales": torch.ones(8),
        "position_ids": torch.ones(1, 8, dtype=torch.int64),
    }
    src = write_folder(tmp_path / "src", sample_tensors() | extra)
    (src / "config.json").write_text('{"quantization_config": null, "quantization": {}}')
    assert inspect_checkpoint(src).kind == "plain, not quantized"
    save_file(sample_tensors(), src / "model.safetensors", metadata={"format": "mlx"})
    assert quantize_checkpoint(src, tmp_path / "dst").plan.quantized


def adapter(prefix="base_model.model.model.layers.0.self_attn.q_proj"):
    return {f"{prefix}.lora_A.weight": torch.randn(4, 64), f"{prefix}.lora_B.weight": torch.randn(64, 4)}


@pytest.mark.parametrize("file", ("adapter_model.safetensors", "model.safetensors", "pytorch_lora_weights.safetensors"))
def test_adapters(tmp_path, file):
    src = tmp_path / "src"
    src.mkdir()
    (src / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file(adapter(), src / file)
    for path in (src, src / file):
        with pytest.raises(CheckpointError, match="is an adapter .* Merge it into its base .* or quantize the base"):
            quantize_checkpoint(path, tmp_path / "dst")
        assert inspect_checkpoint(path).kind == "an adapter (of peft)"
    assert os.listdir(tmp_path) == ["src"]


def test_adapters_of_another_kind_are_known_by_the_files_name(tmp_path):
    save_file({"prompt_embeddings": torch.randn(8, 64)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="is an adapter"):
        quantize_checkpoint(tmp_path, tmp_path / "dst")


def test_a_model_with_adapters_within_is_a_model(tmp_path):
    src = write_folder(tmp_path / "src", {**sample_tensors(), **adapter("model.layers.0.self_attn.q_proj")})
    quantize_checkpoint(src, tmp_path / "dst")


DIFFUSERS = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("source", "stem"),
    (
        (f"{DIFFUSERS}.safetensors", DIFFUSERS),
        (f"{DIFFUSERS}.fp16.safetensors", DIFFUSERS),
        ("model.safetensors", "model"),
        ("model.fp16.safetensors", "model"),
        ("open_clip_model.safetensors", "open_clip_model"),
        ("flux1.dev.safetensors", "flux1.dev"),
    ),
)
@pytest.mark.parametrize("size", (10**9, 4000))
def test_files_keep_the_name_that_their_library_looks_for(tmp_path, source, stem, size):
    """Of a single file, of shards and their index; forth and back."""
    src = write_folder(tmp_path / "src")
    (src / "model.safetensors").rename(src / source)
    quantize_checkpoint(src, tmp_path / "dst", max_shard_size=size)
    dequantize_checkpoint(tmp_path / "dst", tmp_path / "back", max_shard_size=size)
    for folder in (tmp_path / "dst", tmp_path / "back"):
        names = {name for name in os.listdir(folder) if ".safetensors" in name}
        if size > 4000:
            assert names == {f"{stem}.safetensors"}
        else:
            index = json.loads((folder / f"{stem}.safetensors.index.json").read_text())
            shards = set(index["weight_map"].values())
            assert names == shards | {f"{stem}.safetensors.index.json"} and len(shards) > 2
            assert all(name.startswith(f"{stem}-0000") for name in shards)
        assert verify_checkpoint(folder).ok


@pytest.mark.parametrize(
    ("index", "shard", "stem"),
    (
        (f"{DIFFUSERS}.safetensors.index.json", f"{DIFFUSERS}-00001-of-00001.safetensors", DIFFUSERS),
        (f"{DIFFUSERS}.safetensors.index.fp16.json", f"{DIFFUSERS}.fp16-00001-of-00001.safetensors", DIFFUSERS),
        (f"{DIFFUSERS}.safetensors.index.fp16.json", f"{DIFFUSERS}-00001-of-00001.fp16.safetensors", DIFFUSERS),
        ("model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors", "model"),
    ),
)
def test_shards_of_a_variant(tmp_path, index, shard, stem):
    tensors = sample_tensors()
    src = write_folder(tmp_path / "src", tensors)
    (src / "model.safetensors").rename(src / shard)
    (src / index).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
    for path in (src, src / index, src / shard):
        dst = tmp_path / f"dst of {path.name}"
        report = quantize_checkpoint(path, dst)
        assert report.files == (f"{stem}.safetensors",) and report.left_out == ()
        assert not list(dst.glob("*index*"))


def test_one_set_of_weights_beside_its_variant(tmp_path):
    src = write_folder(tmp_path / "src")
    (src / "model.safetensors").rename(src / f"{DIFFUSERS}.safetensors")
    save_file({"x": torch.zeros(2)}, src / f"{DIFFUSERS}.fp16.safetensors")
    report = quantize_checkpoint(src, tmp_path / "dst")
    assert report.files == (f"{DIFFUSERS}.safetensors",) and report.left_out == (f"{DIFFUSERS}.fp16.safetensors",)


def test_a_pipeline_is_not_one_model(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    for name in ("unet", "vae", "scheduler"):
        (tmp_path / name).mkdir()
    for name in ("unet", "vae"):
        save_file({"a.weight": torch.randn(8, 64)}, tmp_path / name / f"{DIFFUSERS}.safetensors")
    with pytest.raises(CheckpointError, match="is a pipeline of diffusers .* it has weights in unet/, vae/: name one"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="a pipeline of diffusers in which no component has a .safetensors file"):
        quantize_checkpoint(tmp_path, tmp_path / "dst")
    assert quantize_checkpoint(tmp_path / "unet", tmp_path / "dst").plan.quantized


def test_folders_of_folders_name_them(tmp_path):
    (tmp_path / "0_Transformer").mkdir()
    save_file({"a.weight": torch.randn(8, 64)}, tmp_path / "0_Transformer" / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no .safetensors file; it has weights in 0_Transformer/: name one"):
        quantize_checkpoint(tmp_path, tmp_path / "dst")


def sentence_transformer(folder, modules):
    """A model with further modules, as sentence-transformers lays it out."""
    src = write_folder(folder)
    listed = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for i, path in enumerate(modules, 1):
        listed.append({"idx": i, "name": str(i), "path": path, "type": "sentence_transformers.models.Dense"})
    (src / "modules.json").write_text(json.dumps(listed))
    return src


def test_further_modules_are_carried_over(tmp_path):
    """As sentence-transformers lays them out: what modules.json names, and no other weights."""
    src = sentence_transformer(tmp_path / "src", ["1_Pooling", "2_Dense", "3_Dense", "4_Router/sub"])
    for name in ("1_Pooling", "2_Dense", "3_Dense", "4_Router/sub/deep", "onnx", "original"):
        (src / name).mkdir(parents=True)
        (src / name / "config.json").write_text("{}")
    dense = {"linear.weight": torch.randn(32, 64)}
    save_file(dense, src / "2_Dense" / "model.safetensors")
    (src / "2_Dense" / "pytorch_model.bin").write_bytes(b"the same again")
    (src / "3_Dense" / "pytorch_model.bin").write_bytes(b"only so")
    save_file(dense, src / "4_Router" / "sub" / "deep" / "model.safetensors")
    save_file(dense, src / "original" / "model.safetensors")
    (src / "onnx" / "model.onnx").write_bytes(b"onnx")
    (src / "onnx" / "model.onnx_data").write_bytes(b"onnx")
    (src / "original" / "consolidated.00.pth").write_bytes(b"pth")
    (src / "tf_model.ckpt.data-00000-of-00001").write_bytes(b"tf")
    report = quantize_checkpoint(src, tmp_path / "dst")
    assert report.files == ("model.safetensors", "2_Dense/model.safetensors")
    weights = {"3_Dense/pytorch_model.bin", "4_Router/sub/deep/model.safetensors"}
    configs = {f"{n}/config.json" for n in ("1_Pooling", "3_Dense", "4_Router/sub/deep", "onnx", "original")}
    assert set(report.copied) == weights | configs | {"tokenizer.json", "modules.json"}
    assert set(report.left_out) == {
        *("2_Dense/pytorch_model.bin", "original/model.safetensors", "original/consolidated.00.pth"),
        *("onnx/model.onnx", "onnx/model.onnx_data", "tf_model.ckpt.data-00000-of-00001"),
    }
    for name in (*weights, *configs, "2_Dense/config.json"):
        assert (tmp_path / "dst" / name).read_bytes() == (src / name).read_bytes()
    assert verify_checkpoint(tmp_path / "dst").ok
    back = dequantize_checkpoint(tmp_path / "dst", tmp_path / "back")
    assert weights <= set(back.copied) and back.left_out == ()
    for folder in ("dst", "back"):
        written = load_file(tmp_path / folder / "2_Dense/model.safetensors")
        assert list(written) == list(dense) and torch.equal(written["linear.weight"], dense["linear.weight"])
    (tmp_path / "dst" / "2_Dense" / "model.safetensors").write_bytes(b"x")
    assert any("2_Dense" in fault for fault in verify_checkpoint(tmp_path / "dst").faults)
    with pytest.raises(CheckpointError, match="2_Dense/model.safetensors cannot be read as safetensors"):
        dequantize_checkpoint(tmp_path / "dst", tmp_path / "no")


@pytest.mark.parametrize("path", ("../elsewhere", "/etc", "a/../../b"))
def test_modules_elsewhere(tmp_path, path):
    src = sentence_transformer(tmp_path / "src", [path])
    with pytest.raises(CheckpointError, match="which is no folder within"):
        quantize_checkpoint(src, tmp_path / "dst")


@pytest.mark.parametrize("text", ("", "3", "{}", "[3]", '[{"path": 3}]', "[" * 100_000, '[{"path": "x"}]'))
def test_a_modules_json_of_somebody_else(tmp_path, text):
    src = write_folder(tmp_path / "src")
    (src / "modules.json").write_text(text)
    (src / "x").mkdir()
    save_file({"a": torch.zeros(2)}, src / "x" / "model.safetensors")
    report = quantize_checkpoint(src, tmp_path / "dst")
    assert "modules.json" in report.copied and report.left_out == (os.path.join("x", "model.safetensors"),)


FOUR = '{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
NONE = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


@pytest.mark.parametrize(
    ("header", "name"),
    (
        (f'{{"a":{NONE},"a":{FOUR}}}', "a"),  # one reader finds four numbers, another one none
        (f'{{"a":{FOUR},"a":{FOUR}}}', "a"),
        (f'{{"a":{FOUR},"\\u0061":{FOUR}}}', "a"),
        (f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{FOUR}}}', "x"),
    ),
)
def test_a_name_twice_in_a_header(tmp_path, header, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(16))
    with pytest.raises(CheckpointError, match=f"has the name {name!r} twice"):
        Checkpoint(path)


def test_a_name_in_two_shards(tmp_path):
    shards = write_folder(tmp_path / "m", shards=2)
    first, second = (shards / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    for file, value in ((first, 1.0), (second, 2.0)):
        save_file({**load_file(file), "twice": torch.full((3,), value)}, file)
    with pytest.raises(CheckpointError, match="'twice' is in .*00001.* and in .*00002.*, and the index lists neither"):
        Checkpoint(shards)
    for file, value in ((first, 1.0), (second, 2.0)):  # what the index says holds
        index = json.loads((shards / "model.safetensors.index.json").read_text())
        index["weight_map"]["twice"] = file.name
        (shards / "model.safetensors.index.json").write_text(json.dumps(index))
        assert Checkpoint(shards).read("twice").tolist() == [value] * 3
