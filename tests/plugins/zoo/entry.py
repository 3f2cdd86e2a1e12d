"""What the zoo keeps of one class of transformers: a tiny configuration, inputs, and the model that they make."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from fourbit.nn import PackedModule

SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 4, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
GROUPED = {**SMALL, "num_key_value_heads": 2}
"""Of decoders, keys and values shared by two heads."""

VIT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
VIT |= {"image_size": 16, "patch_size": 8}
"""Of vision towers: four patches."""


@dataclass(frozen=True)
class Entry:
    """One class of the zoo.

    Attributes:
        kind: the class's name in transformers.
        family: for the table: decoder, encoder, seq2seq, vision, vision-language, audio, MoE or state-space.
        config: arguments of the class's configuration.
        inputs: makes the arguments of one forward.
        output: the attribute of what forward returns that is compared.
        dtype: of the weights.
        variant: what sets the entry apart from others of its class, "" if there is one.
        reads: the weight of a layer that the model's own code reads, "" if none: bitsandbytes' is no matrix.
        daily: whether it is tried in a plain `pytest`, and not only with --long.
    """

    kind: str
    family: str
    config: dict[str, Any] = field(repr=False)
    inputs: Callable[[], dict[str, Any]] = field(repr=False)
    output: str = "logits"
    dtype: torch.dtype = torch.bfloat16
    variant: str = ""
    reads: str = ""
    daily: bool = False

    @property
    def name(self) -> str:
        """Of the entry: the class's, and the variant's."""
        return f"{self.kind} {self.variant}".strip()

    @property
    def model_class(self) -> Any:
        """None where the installed transformers has no such class."""
        return getattr(transformers, self.kind, None)

    def build(self) -> nn.Module:
        """The model in eval mode, its weights random and the same each time: no tensor is constant."""
        torch.manual_seed(0)
        model = self.model_class._from_config(self.model_class.config_class(**self.config), dtype=self.dtype).eval()
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if name.endswith("e_score_correction_bias"):
                    tensor.normal_(std=0.1)
                elif tensor.requires_grad:  # sines and cosines are computed, and in no folder
                    # norms stay near one, or nothing would reach the output
                    tensor.normal_(mean=float(tensor.dim() == 1 and "norm" in name), std=0.08)
        return model

    @torch.no_grad()
    def run(self, model: nn.Module) -> torch.Tensor:
        """What is compared: the output of one forward, on inputs that are the same each time."""
        torch.manual_seed(1)
        taken = inspect.signature(type(model).forward).parameters
        inputs = {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in self.inputs().items()
            if name in taken  # not every version of transformers asks for all of them
        }
        return getattr(model(**inputs), self.output)


def tokens() -> dict[str, Any]:
    """Inputs of a language model: none of them one of the first ten tokens, which may mean something."""
    return {"input_ids": torch.arange(10, 22)[None]}


def translation() -> dict[str, Any]:
    """Inputs of an encoder and a decoder."""
    return {"input_ids": torch.arange(10, 22)[None], "decoder_input_ids": torch.arange(30, 38)[None]}


def image() -> dict[str, Any]:
    """Inputs of a vision model."""
    return {"pixel_values": torch.randn(1, 3, 16, 16)}


def large_image() -> dict[str, Any]:
    """Inputs of a vision model whose features get coarser from stage to stage."""
    return {"pixel_values": torch.randn(1, 3, 32, 32)}


def load(entry: Entry, folder: Path, **more: object) -> nn.Module:
    """from_pretrained, all of whose tensors must be found."""
    model, found = entry.model_class.from_pretrained(folder, output_loading_info=True, **more)
    assert not any(found.values()), found
    return model.eval()


def packed(model: nn.Module) -> dict[str, PackedModule]:
    """Its 4-bit layers and stacks of experts."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
