"""Small model folders for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def sample_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every kind of tensor that a model folder has, with odd sizes and all dtypes."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=g).to(dtype)

    return {
        "model.embed_tokens.weight": rand(50, 33, dtype=torch.bfloat16),
        "model.layers.0.self_attn.q_proj.weight": rand(7, 33, dtype=torch.bfloat16),
        "model.layers.0.self_attn.q_proj.bias": rand(7, dtype=torch.bfloat16),
        "model.layers.0.self_attn.k_proj.weight": rand(64, 128, dtype=torch.float16),
        "model.layers.0.mlp.up_proj.weight": rand(300, 64),
        "model.layers.0.mlp.experts.gate_up_proj": rand(3, 10, 33, dtype=torch.bfloat16),
        "model.layers.0.mlp.gate.weight": rand(3, 33),
        "model.norm.weight": rand(33),
        "model.buffer": torch.tensor(7),
        "model.mask": torch.tensor([True, False, True]),
        "lm_head.weight": rand(50, 33, dtype=torch.bfloat16),
    }


QUANTIZED = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.experts.gate_up_proj",
)


def write_folder(folder: Path, tensors: dict[str, torch.Tensor] | None = None, shards: int = 1) -> Path:
    """A model folder with the given tensors in so many shards, a config and a tokenizer."""
    tensors = sample_tensors() if tensors is None else tensors
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 33}))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: t for j, (name, t) in enumerate(tensors.items()) if j % shards == i}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: dict[str, object]) -> None:
    """model.safetensors.index.json"""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def folder_of(model: torch.nn.Module, folder: Path, config: dict[str, object] | None = None) -> Path:
    """A folder with the model's state dict, and with this config.json."""
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


COMPONENTS = {"transformer": "FluxTransformer2DModel", "text_encoder": "CLIPTextModel", "vae": "AutoencoderKL"}
"""The components of `write_pipeline` that have weights, and their classes."""


def write_pipeline(folder: Path, layers: int = 4) -> Path:
    """A pipeline of diffusers: a denoiser in two files, a text encoder, a vae, a tokenizer and a scheduler."""
    listed: dict[str, object] = {"_class_name": "FluxPipeline", "_diffusers_version": "0.42.1", "force_zeros": True}
    g = torch.Generator().manual_seed(0)
    for name, kind in COMPONENTS.items():
        library = "transformers" if name == "text_encoder" else "diffusers"
        listed[name] = [library, kind]
        stem = "model" if library == "transformers" else "diffusion_pytorch_model"
        blocks = {f"blocks.{i}.to_q.weight": torch.randn(48, 64, generator=g).half() for i in range(layers)}
        tensors = {**blocks, "norm.weight": torch.randn(64, generator=g).half(), "steps": torch.arange(3)}
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"_name": name}))
        if name != "transformer":
            save_file(tensors, folder / name / f"{stem}.safetensors", metadata={"format": "pt"})
            continue
        weight_map = {}
        for i in range(2):
            file = f"{stem}-{i + 1:05d}-of-00002.safetensors"
            part = {key: tensor for j, (key, tensor) in enumerate(tensors.items()) if j % 2 == i}
            save_file(part, folder / name / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / name / f"{stem}.safetensors.index.json").write_text(index)
    for name, file in (("tokenizer", "vocab.json"), ("scheduler", "scheduler_config.json")):
        listed[name] = ["transformers" if name == "tokenizer" else "diffusers", "Any"]
        (folder / name).mkdir()
        (folder / name / file).write_text("{}")
    listed["image_encoder"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(listed))
    return folder
