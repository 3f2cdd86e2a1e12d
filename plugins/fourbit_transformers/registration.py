"""fourbit's entries in transformers' tables of quantizers.

Folders of fourbit say `quant_method: bitsandbytes`, so that others read them, and bear fourbit's mark. So what stands
in the tables for bitsandbytes in 4 bits looks for the mark, and leaves everything without one to what stood there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.quantizers import auto

from fourbit.config import MARK
from fourbit_transformers.config import METHOD, FourbitConfig
from fourbit_transformers.quantizer import FourbitQuantizer

_THEIRS = "bitsandbytes_4bit"


class _Take:
    """Whether unmarked folders, and BitsAndBytesConfig(load_in_4bit=True), are fourbit's too."""

    over = False


def register() -> None:
    """Register with transformers; does nothing the second time."""
    configs: dict[str, Any] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    quantizers: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    if METHOD in configs:
        return
    auto.register_quantization_config(METHOD)(FourbitConfig)
    auto.register_quantizer(METHOD)(FourbitQuantizer)
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, FourbitConfig)  # type: ignore[assignment]
    config, quantizer = configs[_THEIRS], quantizers[_THEIRS]

    class MarkedOrTheirs(config):  # type: ignore[misc, valid-type]
        """bitsandbytes' configuration, or fourbit's for a folder with its mark."""

        @classmethod
        def from_dict(cls, config_dict: Mapping[str, Any], *arguments: Any, **more: Any) -> Any:
            chosen = FourbitConfig if MARK in config_dict or _Take.over else config
            return chosen.from_dict(config_dict, *arguments, **more)

    class OursOrTheirs(quantizer):  # type: ignore[misc, valid-type]
        """bitsandbytes' quantizer, or fourbit's if it has taken over."""

        def __new__(cls, quantization_config: Any, **arguments: Any) -> Any:
            if _Take.over:
                return FourbitQuantizer(FourbitConfig.from_bitsandbytes(quantization_config), **arguments)
            return quantizer(quantization_config, **arguments)

    configs[_THEIRS], quantizers[_THEIRS] = MarkedOrTheirs, OursOrTheirs


def take_over_bitsandbytes(enabled: bool = True) -> None:
    """Have fourbit serve all that asks transformers for bitsandbytes in 4 bits, in this process, from now on.

    Folders that bitsandbytes wrote (NF4, FP4, double-quantized, any quant_storage) open with fourbit's modules, and
    `quantization_config=BitsAndBytesConfig(load_in_4bit=True, …)` quantizes with fourbit. Reading folders needs no
    bitsandbytes (transformers wants it where a BitsAndBytesConfig is made). Models that are loaded already stay what
    they are; `enabled=False` gives it back.
    """
    register()
    _Take.over = enabled
