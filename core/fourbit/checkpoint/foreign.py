"""What is no 16- or 32-bit model: weights that someone quantized already, and adapters.

config.json says who quantized it, and where that is missing, the names and types of the tensors do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.reader import Checkpoint, TensorInfo

ADAPTER_STEM = "adapter_model"

_LORA_MARKS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.", ".lora_embedding_")

_LEAVES: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset(("qweight", "g_idx")), "GPTQ"),
    (frozenset(("qweight", "qzeros")), "AWQ (or GPTQ without g_idx)"),
    (frozenset(("qweight", "scales")), "GPTQ or AWQ"),
    (frozenset(("q_weight", "q_scale")), "ExLlamaV2"),
    (frozenset(("weight_packed", "weight_scale")), "compressed-tensors"),
    (frozenset(("weight_packed", "weight_shape")), "compressed-tensors"),
    (frozenset(("weight", "weight_scale_inv")), "FP8 (weight_scale_inv)"),
    (frozenset(("codes", "codebooks")), "AQLM"),
    (frozenset(("W_q", "meta")), "HQQ"),
    (frozenset(("W_q", "scale")), "HQQ"),
    (frozenset(("_data", "_scale")), "quanto"),
    (frozenset(("_weight_qdata",)), "torchao"),
    (frozenset(("weight_qdata",)), "torchao"),
    (frozenset(("qdata", "scale")), "torchao"),
)
"""Names that the tensors of one module have, the last component only, and whose they are."""

_FLOAT8 = frozenset(
    (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)
)
_INTEGERS = frozenset((torch.int8, torch.uint8, torch.int32, torch.uint32))


def require_unquantized(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if the source is an adapter, or quantized, by whomever."""
    if is_adapter(checkpoint):
        raise CheckpointError(
            f"{checkpoint.path} is an adapter (LoRA or another one of peft), not a model: a 4-bit adapter loads"
            " nowhere. Merge it into its base first (peft's merge_and_unload, then save_pretrained) and quantize that,"
            " or quantize the base and load the adapter onto it as it is"
        )
    first = next(iter(checkpoint.quantized()), None)
    if first is not None:
        raise CheckpointError(f"{checkpoint.path} is quantized already: {first} is a 4-bit weight")
    found = quantized_by(checkpoint)
    if found is not None:
        method, why = found
        raise CheckpointError(f"{checkpoint.path} is quantized already: {why} {method}; want 16- or 32-bit weights")


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether it holds an adapter's weights alone; a model with some beside its own is none."""
    if checkpoint.stem == ADAPTER_STEM or checkpoint.files[0].name.startswith(ADAPTER_STEM):
        return True
    lora = sum(info.nbytes for name, info in checkpoint.entries.items() if any(mark in name for mark in _LORA_MARKS))
    # a few models have adapters within, a tenth of their bytes
    return 2 * lora > checkpoint.nbytes


def quantized_by(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """The method by which the weights were quantized, and what says so; None if they were not.

    The layout of bitsandbytes in 4 bits, which is fourbit's own, is found by `Checkpoint.quantized`.
    """
    method = _by_config(checkpoint)
    if method is not None:
        return method, "its config.json says"
    return _by_tensors(checkpoint.entries)


def _by_config(checkpoint: Checkpoint) -> str | None:
    config = checkpoint.config
    mlx = config.get("quantization")
    if isinstance(mlx, dict) and mlx.keys() & {"bits", "group_size", "mode"}:
        return "MLX"
    entry = checkpoint.quantization_config()
    if entry:
        return _method(entry)
    if isinstance(config.get("compression_config"), dict):
        return "compressed-tensors"
    parts = (value.get("quantization_config") for value in config.values() if isinstance(value, dict))
    return next((_method(entry) for entry in parts if entry and isinstance(entry, dict)), None)


def _method(entry: Mapping[str, Any]) -> str:
    return str(entry.get("quant_method", "an unnamed method"))[:80]


def _by_tensors(entries: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in entries.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = info
    for leaves in modules.values():
        for info, method in _signs(leaves):
            return method, f"its tensor {info.name!r} is that of"
    return None


def _signs(leaves: Mapping[str, TensorInfo]) -> Iterator[tuple[TensorInfo, str]]:
    """The tensors of one module by which a method is known."""
    for names, method in _LEAVES:
        if names <= leaves.keys():
            yield leaves[min(names)], method
    for leaf, info in leaves.items():
        scale = next((s for s in (f"{leaf}_scale", f"{leaf}_scales", f"{leaf}_scale_2", "scales") if s in leaves), None)
        if info.dtype in _INTEGERS and len(info.shape) >= 2:
            if leaf == "weight" and info.dtype is torch.uint32 and scale == "scales":
                yield info, "MLX"
            elif leaf == "weight" and "SCB" in leaves:
                yield info, "bitsandbytes in 8 bits"
            elif leaf.endswith("_blocks") and leaf.removesuffix("_blocks") + "_scales" in leaves:
                yield info, "MXFP4"
            elif scale is not None:
                yield info, "a method that stores integers with scales"
        elif info.dtype in _FLOAT8 and len(info.shape) >= 2:
            yield info, "FP8"
