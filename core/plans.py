"""The plan: which tensors of a model are quantized, which are not, by which rule, and how many bytes that makes.

One set of rules for a model in memory and for a folder on disk. In memory the module's type says what a
tensor is; in a folder there are only names and shapes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fourbit import checks, dispatch
from fourbit.config import QuantConfig
from fourbit.state import dtype_name, quantized_nbytes

LARGE = 1 << 20
"""Elements from which a tensor that stays in 16 bit by no deliberate choice is pointed out: 2 MB."""

HEADS = ("lm_head", "embed_out", "score", "classifier", "qa_outputs")
ROUTERS = ("gate", "router", "shared_expert_gate")
MOST_EXPERTS = 4096
TRANSPOSED_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gpt_bigcode")
"""Model types whose projections are transformers' Conv1D: [in, out], which other readers transpose."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a plan.

    Attributes:
        name: of the tensor, as in the state dict.
        shape, dtype: as it is now.
        action: "quantize" or "skip".
        rule: in words, why.
        bytes_before, bytes_after: of storage; both 0 for a tensor that shares another's.
        module: dotted name of the module that owns it.
        kind: "linear", "experts", "embedding", "convolution", "other".
        deliberate: whether a skip is by choice (the user's, or a rule that holds for every model), or because
            fourbit does not know how.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    action: str
    rule: str
    bytes_before: int
    bytes_after: int
    module: str
    kind: str
    deliberate: bool = True

    @property
    def parameters(self) -> int:
        """Elements, 0 for a tensor that shares another's storage."""
        return prod(self.shape) if self.bytes_before else 0

    @property
    def large_left(self) -> bool:
        """Whether it is a large tensor that stays in 16 bit though nobody chose so."""
        return self.action == "skip" and not self.deliberate and prod(self.shape) >= LARGE

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "action": self.action,
            "rule": self.rule,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "large_left": self.large_left,
        }


@dataclass(frozen=True)
class QuantPlan:
    """What quantizing a model would do. `print(plan)` is a table; `plan.to_dict()` is JSON.

    Attributes:
        tensors: every parameter (of a folder: every tensor), in order.
        config: as it was asked for.
        blocksize: that `config.blocksize` comes to.
    """

    tensors: tuple[PlannedTensor, ...]
    config: QuantConfig
    blocksize: int
    source: str = field(default="", compare=False)

    @property
    def quantized(self) -> tuple[PlannedTensor, ...]:
        """The tensors that are quantized."""
        return tuple(t for t in self.tensors if t.action == "quantize")

    @property
    def skipped(self) -> tuple[PlannedTensor, ...]:
        """The tensors that stay as they are."""
        return tuple(t for t in self.tensors if t.action == "skip")

    @property
    def large_left(self) -> tuple[PlannedTensor, ...]:
        """Large tensors that stay in 16 bit though nobody chose so."""
        return tuple(t for t in self.tensors if t.large_left)

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors now."""
        return sum(t.bytes_before for t in self.tensors)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors afterwards, scales included."""
        return sum(t.bytes_after for t in self.tensors)

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(t.parameters for t in self.tensors)

    @property
    def quantized_parameters(self) -> int:
        """Elements of the tensors that are quantized."""
        return sum(t.parameters for t in self.quantized)

    @property
    def bits_per_quantized_parameter(self) -> float:
        """Bits an element of the quantized tensors, scales included; 0 if there are none."""
        count = self.quantized_parameters
        return 8 * sum(t.bytes_after for t in self.quantized) / count if count else 0.0

    @property
    def bits_per_parameter(self) -> float:
        """Bits an element of the whole model; 0 for an empty one."""
        return 8 * self.bytes_after / self.parameters if self.parameters else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "source": self.source,
            "config": self.config.to_dict(),
            "blocksize": self.blocksize,
            "parameters": self.parameters,
            "quantized_parameters": self.quantized_parameters,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_quantized_parameter": self.bits_per_quantized_parameter,
            "bits_per_parameter": self.bits_per_parameter,
            "large_left": [t.name for t in self.large_left],
            "tensors": [t.to_dict() for t in self.tensors],
        }

    def __str__(self) -> str:
        width = max((len(t.name) for t in self.tensors), default=4)
        lines = [f"{'tensor':{width}}  {'shape':>18}  {'before':>13}  {'after':>13}  what and why"]
        for t in self.tensors:
            shape = "×".join(map(str, t.shape))
            mark = "  <-- LARGE, STAYS AS IT IS" if t.large_left else ""
            lines.append(
                f"{t.name:{width}}  {shape:>18}  {t.bytes_before:>13,}  {t.bytes_after:>13,}"
                f"  {t.action}: {t.rule}{mark}"
            )
        lines.append(self.summary())
        return "\n".join(lines)

    def summary(self) -> str:
        """The totals, and every large tensor that stays in 16 bit, in a few lines."""
        lines = [
            f"{len(self.quantized)} of {len(self.tensors)} tensors quantized to {self.config.quant_type}, blocksize"
            f" {self.blocksize}: {self.bytes_before:,} -> {self.bytes_after:,} bytes;"
            f" {self.bits_per_quantized_parameter:.3f} bits per quantized parameter,"
            f" {self.bits_per_parameter:.3f} bits per parameter of the whole"
        ]
        chosen = [t for t in self.skipped if t.parameters >= LARGE and not t.large_left]
        if chosen:
            names = ", ".join(f"{t.name} ({t.bytes_after / 1e6:.1f} MB, {t.rule})" for t in chosen)
            lines.append(f"large tensors that stay as they are by rule: {names}")
        for t in self.large_left:
            lines.append(f"WARNING: {t.name} ({t.bytes_after / 1e6:.1f} MB) STAYS AS IT IS: {t.rule}")
        return "\n".join(lines)


def plan(
    model_or_folder: nn.Module | str | os.PathLike[str],
    config: QuantConfig | None = None,
    *,
    device: torch.device | str | None = None,
) -> QuantPlan:
    """What quantizing a model would do, without doing it.

    Args:
        model_or_folder: an nn.Module (also on the meta device), or a folder of safetensors, of which only the
            headers are read.
        config: default QuantConfig().
        device: where it would be quantized, for the default blocksize; None: where the model is, or the CPU.

    Raises OSError or ValueError for a folder that cannot be read.
    """
    config = config or QuantConfig()
    if isinstance(model_or_folder, nn.Module):
        found = list(_of_model(model_or_folder, config))
        where = next((p.device for p in model_or_folder.parameters() if p.device.type != "meta"), None)
        source = type(model_or_folder).__name__
    else:
        found = list(_of_folder(Path(model_or_folder), config))
        where, source = None, str(model_or_folder)
    chosen = torch.device(device) if device is not None else where or torch.device("cpu")
    blocksize = config.blocksize or dispatch.default_blocksize(chosen)
    tensors = tuple(_planned(f, config, blocksize) for f in found)
    return QuantPlan(tensors, config, blocksize, source)


@dataclass(frozen=True)
class _Found:
    """A tensor as the walk found it."""

    name: str
    module: str
    leaf: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    nbytes: int
    note: str = ""  # a reason to skip that the walk itself knows
    deliberate: bool = True
    owner: str = "this"  # class of the module, where there is one


def _planned(found: _Found, config: QuantConfig, blocksize: int) -> PlannedTensor:
    action, rule, deliberate = _decide(found, config)
    after = found.nbytes
    if action == "quantize":
        after = quantized_nbytes(prod(found.shape), blocksize, config.double_quant)
    return PlannedTensor(
        *(found.name, found.shape, found.dtype, action, rule, found.nbytes, after, found.module, found.kind),
        deliberate,
    )


def _decide(found: _Found, config: QuantConfig) -> tuple[str, str, bool]:
    """`(action, rule, deliberate)` for one tensor. The order of the rules is their precedence."""
    if found.note:
        return "skip", found.note, found.deliberate
    if not found.dtype.is_floating_point:
        return "skip", f"{dtype_name(found.dtype)}, not floating point", True
    if len(found.shape) < 2:
        return "skip", "not a matrix (norm, bias or scalar)", True
    pattern = config.skips(found.module) or config.skips(found.name)
    if pattern is not None:
        return "skip", f"skip_modules: {pattern}", True
    last = found.module.rsplit(".", 1)[-1]
    if found.kind == "embedding":
        return "skip", "embedding", True
    if last in HEADS or found.module in ("output", "head"):
        return "skip", "output head", True
    if last in ROUTERS and found.shape[0] <= MOST_EXPERTS and len(found.shape) == 2:
        return "skip", "router of a mixture of experts", True
    if found.leaf.endswith("bias"):
        return "skip", "bias", True
    if found.dtype not in checks.COMPUTE_DTYPES:
        return "skip", f"{dtype_name(found.dtype)} is not a 16/32-bit dtype", False
    if found.kind == "linear":
        return "quantize", "linear weight", True
    if found.kind == "experts":
        return "quantize", "stacked expert weights", True
    if found.kind == "convolution":
        return "skip", "convolution", False
    return "skip", f"{found.owner} is not a linear layer that fourbit knows", False


def _is_experts(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and "expert" in name.lower() and "bias" not in name.rsplit(".", 1)[-1]


def _of_model(model: nn.Module, config: QuantConfig) -> Iterator[_Found]:
    from fourbit.nn.packed import PackedModule

    seen: dict[int, str] = {}
    tied = _output_head(model)
    for module_name, module in model.named_modules():
        for leaf, tensor in module._parameters.items():
            if tensor is None:
                continue
            name = f"{module_name}.{leaf}" if module_name else leaf
            shape, nbytes, note = tuple(tensor.shape), tensor.nbytes, ""
            kind = _kind(module, leaf, name, shape)
            if id(tensor) in seen:
                nbytes, note = 0, f"tied to {seen[id(tensor)]}"
            elif isinstance(module, PackedModule) and leaf != "bias":
                note = "4-bit already"
            elif type(module).__module__.startswith(("bitsandbytes.", "torchao.")):
                note = f"quantized already, by {type(module).__module__.split('.')[0]}"
            elif module is tied:
                note = "output head"
            seen.setdefault(id(tensor), name)
            owner = type(module).__name__
            yield _Found(name, module_name, leaf, shape, tensor.dtype, kind, nbytes, note, owner=owner)


def _output_head(model: nn.Module) -> nn.Module | None:
    """transformers' output embeddings, where the model has such a method."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        return None
    return head if isinstance(head, nn.Module) else None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear with nn.Linear's own forward, so that Linear4bit can take its place."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _kind(module: nn.Module, leaf: str, name: str, shape: tuple[int, ...]) -> str:
    if is_plain_linear(module) and leaf == "weight":
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if _is_experts(f"{name}.{type(module).__name__}.{leaf}", shape):
        return "experts"
    return "other"


def _of_folder(folder: Path, config: QuantConfig) -> Iterator[_Found]:
    from fourbit.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint(folder)
    packed = set(checkpoint.quantized()) | checkpoint.companions()
    model_type = checkpoint.config.get("model_type")
    for name, info in checkpoint.entries.items():
        module, _, leaf = name.rpartition(".")
        shape = tuple(info.shape)
        note, deliberate = "", True
        if name in packed:
            note = "4-bit already"
        elif model_type in TRANSPOSED_MODELS and leaf == "weight" and len(shape) == 2:
            if _kind_by_name(name, module, leaf, shape) == "linear":
                note, deliberate = f"{model_type} stores its projections transposed (Conv1D)", False
        kind = _kind_by_name(name, module, leaf, shape)
        yield _Found(name, module, leaf, shape, info.dtype, kind, info.nbytes, note, deliberate)


def _kind_by_name(name: str, module: str, leaf: str, shape: tuple[int, ...]) -> str:
    last = module.rsplit(".", 1)[-1].lower()
    if _is_experts(name, shape):
        return "experts"
    if len(shape) > 2:
        return "convolution"
    is_head = last in HEADS
    if not is_head and ("embed" in last or last in ("wte", "wpe", "shared", "relative_attention_bias")):
        return "embedding"
    if leaf == "weight" and len(shape) == 2:
        return "linear"
    return "other"
