"""FourbitConfig: what `quantization_config=` takes, and what a folder's config.json holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from fourbit.config import MARK, QuantConfig, as_bitsandbytes

METHOD = "fourbit"
"""`quant_method` in memory. Files say "bitsandbytes", whose layout they have, beside fourbit's own mark."""

_OFFLOAD = "offload_experts"


class FourbitConfig(QuantizationConfigMixin):
    """How `from_pretrained` is to quantize a model while it loads.

    Args:
        quant_type: "nf4", "fp4", or a plugin's data type.
        blocksize: elements that share a scale; None: the default of the device's backend.
        double_quant: store the scales in 8 bits too: 4.127 bits a parameter instead of 4.5.
        compute_dtype: dtype, or its name, of the forward pass; None follows the input's.
        skip_modules: patterns of module names that stay in 16 bit, see `fourbit.QuantConfig`.
        offload_experts: keep the packed experts of a mixture in host memory, and bring them to the device as they are
            needed. It is of this process, and not written to files.

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
        # a string, or no iterable, is refused by QuantConfig with the right words
        skip = skip_modules if isinstance(skip_modules, str) else tuple(skip_modules or ())
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' own are an enumeration
        self.quant = QuantConfig(quant_type, blocksize, double_quant, compute_dtype, skip)  # type: ignore[arg-type]
        self.offload_experts = bool(offload_experts)
        self.left_modules: tuple[str, ...] = ()
        """Names of the modules that are in 16 bit, once a model is quantized."""
        self.dtype: torch.dtype = torch.bfloat16
        """Of the model's weights, for readers that want a compute dtype."""

    @classmethod
    def of(cls, config: QuantConfig) -> FourbitConfig:
        """The one with the fields of a QuantConfig."""
        return cls(**config.to_dict())

    def get_loading_attributes(self) -> dict[str, Any]:
        """What is for whoever loads a 4-bit folder to say, and not for the folder."""
        return {_OFFLOAD: True} if self.offload_experts else {}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the fields of the constructor, or the entry of a config.json, fourbit's or bitsandbytes'."""
        entry = dict(config_dict)
        if MARK in entry or entry.get("load_in_4bit"):
            fields = _fields(entry)
            if _OFFLOAD in entry:
                fields[_OFFLOAD] = entry[_OFFLOAD]
            found = cls(**fields)
            found.left_modules = tuple(entry.get("llm_int8_skip_modules") or ())
        else:
            found = cls(**entry)
        unused = {}
        for key, value in kwargs.items():
            if key == _OFFLOAD:
                found.offload_experts = bool(value)
            else:
                unused[key] = value
        return (found, unused) if return_unused_kwargs else found

    @classmethod
    def from_bitsandbytes(cls, config: Any) -> FourbitConfig:
        """From transformers' BitsAndBytesConfig. Raises ValueError for one of 8 bits."""
        if not config.load_in_4bit:
            raise ValueError("fourbit has no 8-bit weights: want BitsAndBytesConfig(load_in_4bit=True)")
        return cls.from_dict(config.to_dict())  # type: ignore[no-any-return]

    def to_dict(self) -> dict[str, Any]:
        """The entry of config.json."""
        return as_bitsandbytes(self.quant, self.quant.compute_dtype or self.dtype, self.left_modules)

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
    compute = entry.get("bnb_4bit_compute_dtype")
    return {
        "quant_type": entry.get("bnb_4bit_quant_type", "fp4"),  # bitsandbytes' default
        "blocksize": 64,  # bitsandbytes' only one; each file's tensors say their own
        "double_quant": bool(entry.get("bnb_4bit_use_double_quant", False)),
        "compute_dtype": compute,
        "skip_modules": tuple(entry.get("llm_int8_skip_modules") or ()),
    }
