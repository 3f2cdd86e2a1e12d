"""FourbitVllmConfig: what vLLM asks about the quantization of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from fourbit.config import MARK, QuantConfig
from fourbit.plans.layer import TRANSPOSED_MODELS, role_by_name
from fourbit_vllm.experts import FourbitExpertsMethod
from fourbit_vllm.linear import FourbitLinearMethod
from fourbit_vllm.stream import PackedWeights

METHOD = "fourbit"
"""Its name in `--quantization`."""

_THEIRS = "bitsandbytes"


class FourbitVllmConfig(QuantizationConfig):  # type: ignore[misc]
    """How a model is, or is to be, quantized.

    Args:
        quant: for a 16-bit model, how to quantize it while it is loaded; None: the folder is in 4 bits, and what of it
            is in 16 bit stays so.
    """

    def __init__(self, quant: QuantConfig | None = QuantConfig()) -> None:  # noqa: B008  (it is frozen)
        super().__init__()
        self.quant = quant

    def __repr__(self) -> str:
        return f"FourbitVllmConfig({self.quant!r})"

    @classmethod
    def get_name(cls) -> str:
        """As in `--quantization`."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Of activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of fourbit's CUDA backend: 7.5."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: what is to be known is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FourbitVllmConfig:
        """From the entry `quantization_config` of a config.json, or of `--hf-overrides` for a 16-bit model.

        Raises ValueError or TypeError for fields that QuantConfig does not have.
        """
        if MARK in config or config.get("load_in_4bit"):
            return cls(None)
        return cls(QuantConfig.from_dict({key: value for key, value in config.items() if key != "quant_method"}))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """4-bit folders in bitsandbytes' layout are fourbit's, unless they are asked for with another's method."""
        if hf_quant_cfg.get("quant_method") not in (_THEIRS, METHOD) or user_quant not in (None, METHOD):
            return None
        if hf_quant_cfg.get("quant_method") == METHOD or MARK in hf_quant_cfg or hf_quant_cfg.get("load_in_4bit"):
            return METHOD
        return None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Refuse what would be read wrongly. Raises ValueError."""
        kind = getattr(hf_config, "model_type", None)
        if kind in TRANSPOSED_MODELS:
            raise ValueError(
                f"fourbit's vLLM plugin does not serve {kind}: vLLM transposes its weights as it loads them"
            )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """fourbit's for linear layers and experts; embeddings and the output head are vLLM's, in 16 bit."""
        if isinstance(layer, LinearBase):
            return FourbitLinearMethod(self, prefix)
        if isinstance(layer, RoutedExperts):
            return FourbitExpertsMethod(self, prefix, layer.moe_config)
        return None

    @staticmethod
    def get_checkpoint_weight_mapper() -> PackedWeights:
        """Through which vLLM runs the stream of a folder's tensors."""
        return PackedWeights()

    def parts_of(self, prefix: str) -> list[str]:
        """The names in the folder of the layers that a fused one is made of; its own if it is none."""
        parent, _, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        return [f"{parent}.{part}" if parent else part for part in parts]

    def quant_of(self, name: str, shape: tuple[int, ...]) -> QuantConfig | None:
        """How a 16-bit weight is quantized as it is loaded, by the rules of `fourbit quantize`; None: it is not."""
        if self.quant is None or role_by_name(name, shape) or self.quant.skips(name) is not None:
            return None
        return self.quant
