"""fourbit's entries in diffusers' tables of quantizers.

Folders of fourbit say `quant_method: bitsandbytes`, so that others read them, and bear fourbit's mark. So what stands
in the tables for bitsandbytes in 4 bits looks for the mark, and leaves everything without one to what stood there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.quantizers import auto

from fourbit.config import MARK
from fourbit_diffusers.config import METHOD, FourbitConfig
from fourbit_diffusers.quantizer import FourbitQuantizer

_THEIRS = "bitsandbytes_4bit"


class _Take:
    """Whether unmarked folders, and BitsAndBytesConfig(load_in_4bit=True), are fourbit's too."""

    over = False


def register() -> None:
    """Register with diffusers; does nothing the second time."""
    configs: dict[str, Any] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    quantizers: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    if METHOD in configs:
        return
    configs[METHOD], quantizers[METHOD] = FourbitConfig, FourbitQuantizer
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
            return (FourbitQuantizer if _Take.over else quantizer)(quantization_config, **arguments)

    configs[_THEIRS], quantizers[_THEIRS] = MarkedOrTheirs, OursOrTheirs


def take_over_bitsandbytes(enabled: bool = True) -> None:
    """Have fourbit serve all that asks diffusers for bitsandbytes in 4 bits, in this process, from now on.

    Folders that bitsandbytes wrote (NF4, FP4, double-quantized, any quant_storage) open with fourbit's modules, and
    `quantization_config=BitsAndBytesConfig(load_in_4bit=True, …)` quantizes with fourbit. Neither needs a GPU;
    folders need no bitsandbytes installed, but diffusers makes a BitsAndBytesConfig for 4 bits only where it is.
    Models that are loaded already stay what they are; `enabled=False` gives it back. transformers' components of a
    pipeline are `fourbit_transformers.take_over_bitsandbytes()`'s.
    """
    register()
    _Take.over = enabled
