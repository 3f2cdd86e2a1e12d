"""FourbitConfig: what `quantization_config=` takes, and what a folder's config.json holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import torch
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from fourbit.config import MARK, QuantConfig, as_bitsandbytes, as_compute_dtype

METHOD = "fourbit"
"""`quant_method` in memory. Files say "bitsandbytes", whose layout they have, beside fourbit's own mark."""

_DTYPE = "torch_dtype"


class _Method(str, Enum):
    """diffusers wants its methods with a `.value`."""

    FOURBIT = METHOD


class FourbitConfig(QuantizationConfigMixin):
    """How `from_pretrained` is to quantize a model of diffusers while it loads.

    Args:
        quant_type: "nf4", "fp4", or a plugin's data type.
        blocksize: elements that share a scale; None: the default of the device's backend.
        double_quant: store the scales in 8 bits too: 4.127 bits a parameter instead of 4.5.
        compute_dtype: dtype, or its name, of the forward pass; None follows the input's.
        skip_modules: patterns of module names that stay in 16 bit, see `fourbit.QuantConfig`.
        offload_experts: for models of transformers only; here it must be False. It is there so that a pipeline's
            `PipelineQuantizationConfig(quant_backend="fourbit", quant_kwargs=…)` has the same for both libraries.

    Raises TypeError or ValueError, naming the field.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        blocksize: int | None = None,
        double_quant: bool = False,
        compute_dtype: torch.dtype | str | None = None,
        skip_modules: Iterable[str] = (),
        offload_experts: bool = False,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            raise TypeError(f"FourbitConfig has no {next(iter(unknown))!r}")
        if offload_experts:
            raise ValueError("FourbitConfig: offload_experts is for models of transformers; diffusers has none for it")
        # a string, or no iterable, is refused by QuantConfig with the right words
        skip = skip_modules if isinstance(skip_modules, str) else tuple(skip_modules or ())
        self.quant_method = _Method.FOURBIT  # type: ignore[assignment]  # one that diffusers' own do not have
        self.quant = QuantConfig(quant_type, blocksize, double_quant, compute_dtype, skip)  # type: ignore[arg-type]
        self.left_modules: tuple[str, ...] = ()
        """Names of the linear layers that are in 16 bit, once a model is quantized."""
        self.dtype: torch.dtype | None = None
        """The model's, once one is quantized: what it is loaded in if `torch_dtype` is not given."""

    @classmethod
    def of(cls, config: Any) -> FourbitConfig:
        """The one with the fields of a QuantConfig, of transformers' FourbitConfig, or of a BitsAndBytesConfig."""
        quant = config if isinstance(config, QuantConfig) else getattr(config, "quant", None)
        if isinstance(quant, QuantConfig):
            new = cls(**quant.to_dict(), offload_experts=getattr(config, "offload_experts", False))
            if isinstance(config, cls):
                new.left_modules, new.dtype = config.left_modules, config.dtype
            return new
        if not getattr(config, "load_in_4bit", True):
            raise ValueError("fourbit has no 8-bit weights: want BitsAndBytesConfig(load_in_4bit=True)")
        return cls.from_dict(config.to_dict())  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the fields of the constructor, or the entry of a config.json, fourbit's or bitsandbytes'."""
        entry = dict(config_dict)
        if MARK in entry or entry.get("load_in_4bit"):
            found = cls(**_fields(entry))
            found.left_modules = tuple(entry.get("llm_int8_skip_modules") or ())
            found.dtype = as_compute_dtype(entry.get(_DTYPE) or entry.get("bnb_4bit_compute_dtype"))
        else:
            found = cls(**entry)
        return (found, kwargs) if return_unused_kwargs else found

    def to_dict(self) -> dict[str, Any]:
        """The entry of config.json."""
        dtype = self.dtype or torch.float32
        entry = as_bitsandbytes(self.quant, self.quant.compute_dtype or dtype, self.left_modules)
        return {**entry, _DTYPE: str(dtype).removeprefix("torch.")}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: every field says something about the files."""
        return self.to_dict()


def _fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments from the entry of a config.json."""
    mark = entry.get(MARK)
    if mark is not None:
        if not isinstance(mark, Mapping):
            raise ValueError(f"quantization_config: {MARK!r} is not an object")
        return QuantConfig.from_dict(mark).to_dict()
    skip = [name for name in entry.get("llm_int8_skip_modules") or () if name]
    return {
        "quant_type": entry.get("bnb_4bit_quant_type", "fp4"),  # bitsandbytes' default
        "blocksize": 64,  # bitsandbytes' only one on the fly; each file's tensors say their own
        "double_quant": bool(entry.get("bnb_4bit_use_double_quant", False)),
        "compute_dtype": entry.get("bnb_4bit_compute_dtype"),
        "skip_modules": (*skip, *(f"{name}.*" for name in skip)),  # there a name means all that is in it, too
    }
