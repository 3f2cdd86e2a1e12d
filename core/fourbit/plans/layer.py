"""The description of one tensor and of the layer that owns it, and what names alone say about one."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

HEADS = ("lm_head", "lm_heads", "embed_out", "score", "classifier", "qa_outputs")
ROUTERS = ("gate", "router", "router_gate", "shared_expert_gate")
MOST_EXPERTS = 4096
"""Rows up to which a matrix that is a gate or router by its name alone is one."""
EMBEDDINGS = ("wte", "wpe", "shared", "relative_attention_bias")
TRANSPOSED_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
"""Model types that have transformers' Conv1D, and
TRANSPOSED: what these layers are called there. Others of such a model are nn.Linear."""
TRANSPOSED = ("c_attn", "q_attn", "c_proj", "c_fc")

_ONE_EXPERT = re.compile(r"\bexperts\.\d+\.")

HEAD, ROUTER = "output head", "router of a mixture of experts"


@dataclass(frozen=True)
class Layer:
    """What the rules know of one tensor.

    Attributes:
        name: of the tensor, in the state dict or the folder.
        module: dotted name of the module that owns it, as the model calls it.
        leaf: the tensor's own name there, such as "weight".
        shape, dtype: as it is now.
        nbytes: of storage; 0 for a tensor in memory that shares another's.
        kind: "linear" (an nn.Linear's own weight), "experts" (stacked, 3-D), "declared" (of a module that a plugin's
            PackedModule replaces), "transposed" (transformers' Conv1D: a linear layer's, but [in, out], and [out, in]
            once it is in 4 bits), "embedding", "convolution", "rearranged" (becomes part of a quantized weight when the
            folder is loaded) or "other".
        role: HEAD, ROUTER or "".
        owner: class of the module, "this" where there is none.
        note: a reason to leave it that the walk itself knows, "" if none.
        adapter: whether it belongs to an adapter (LoRA and its like).
        kept: the model's own pattern by which it stays in float32, "" if none.
        tied_by_model: the tensor that the model's own list ties it to, whether or not they share a storage now, "" if
            it is not on it.
        first: name of the tensor whose storage it shares, "" if it is the first or the only one to use it.
        tied: the other layers that share its storage.
        parts: the layers that its rows are divided among when the folder is loaded, or that it becomes a part of.
        aliases: further names, of the tensor or its module, by which `skip_modules` may call it.
    """

    name: str
    module: str
    leaf: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    kind: str
    role: str = ""
    owner: str = "this"
    note: str = ""
    adapter: bool = False
    kept: str = ""
    tied_by_model: str = ""
    first: str = ""
    tied: tuple[Layer, ...] = ()
    parts: tuple[Layer, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def owns_matrix(self) -> bool:
        """Whether it is the own `weight` of its module, and a matrix: what readers turn into a 4-bit layer."""
        return self.leaf == "weight" and len(self.shape) == 2 and bool(self.module)


def role_by_name(module: str, shape: tuple[int, ...]) -> str:
    """HEAD, ROUTER or "", from a module's dotted name and the shape of its tensor; for what no model describes.

    Any part of the name may say it: `classifier.out_proj`, `lm_heads.0`, `mlp.gate.wg`, `moe.router.layer`; but the
    gate within one expert, `experts.3.gate`, is a half of its gated product.
    """
    of_router = any(part in ROUTERS for part in _ONE_EXPERT.split(module)[0].split("."))
    if of_router and shape and shape[0] <= MOST_EXPERTS:
        return ROUTER
    return HEAD if is_head(module) else ""


def is_head(module: str) -> bool:
    """Whether a module is an output head by its dotted name; of classifiers no model says it."""
    parts = module.split(".")
    return module == "output" or parts[0] == "head" or any(part in HEADS for part in parts)


def kind_by_name(name: str, shape: tuple[int, ...]) -> str:
    """The kind of a tensor of which only name and shape are known."""
    module, _, leaf = name.rpartition(".")
    if is_experts(name, shape):
        return "experts"
    if len(shape) > 2:
        return "convolution"
    # a list's members have numbers for names: embed_tokens.0
    last = next((part for part in reversed(module.lower().split(".")) if not part.isdigit()), "")
    if last not in HEADS and ("embed" in last or last in EMBEDDINGS):
        return "embedding"
    return "linear" if leaf == "weight" and len(shape) == 2 else "other"


def is_transposed(model_type: object, module: str) -> bool:
    """Whether a module is transformers' Conv1D by its name in a model of that type."""
    return model_type in TRANSPOSED_MODELS and module.rpartition(".")[2] in TRANSPOSED


def is_experts(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is the stacked weight of a mixture of experts: 3-D, and the name (or a class in it) says so."""
    return len(shape) == 3 and "expert" in name.lower() and "bias" not in name.rsplit(".", 1)[-1]
