"""QuantConfig: how a model is to be quantized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from fourbit import checks, codebooks
from fourbit.state import DTYPES, dtype_name

MARK = "fourbit"
"""Key in the `quantization_config` of a config.json that fourbit wrote."""


@dataclass(frozen=True)
class QuantConfig:
    """How a model is to be quantized.

    Attributes:
        quant_type: "nf4" (best for most pretrained weights), "fp4" (heavy tails), or a plugin's.
        blocksize: elements that share a scale, a power of two from 32 to 4096; None takes the default of the
            backend that serves the weight's device.
        double_quant: store the scales in 8 bits too.
        compute_dtype: the precision of the forward pass: torch.bfloat16, torch.float16, torch.float32 or one
            of their names; None follows the input's dtype.
        skip_modules: glob patterns of module names that stay as they are, on top of the output head, embeddings,
            norms, routers, adapters and what the model keeps in float32, which always do. A pattern without a dot
            or glob also matches any one part of a name, as transformers' lists do: "v_proj" matches
            "model.layers.0.self_attn.v_proj".

    Raises TypeError or ValueError, naming the field.
    """

    quant_type: str = "nf4"
    blocksize: int | None = None
    double_quant: bool = False
    compute_dtype: torch.dtype | None = None
    skip_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        codebooks.get(self.quant_type)
        if self.blocksize is not None:
            checks.blocksize("QuantConfig", self.blocksize)
        if not isinstance(self.double_quant, bool):
            raise TypeError(f"QuantConfig: double_quant must be a bool, got {type(self.double_quant).__name__}")
        object.__setattr__(self, "compute_dtype", as_compute_dtype(self.compute_dtype))
        skip: Iterable[str] = self.skip_modules or ()
        if isinstance(skip, str) or not all(isinstance(p, str) and p for p in skip):
            raise TypeError(f"QuantConfig: skip_modules must be a list of patterns, got {self.skip_modules!r}")
        object.__setattr__(self, "skip_modules", tuple(skip))

    def skips(self, module_name: str) -> str | None:
        """The first pattern of `skip_modules` that matches the module's dotted name, or None."""
        for pattern in self.skip_modules:
            if fnmatchcase(module_name, pattern) or pattern in module_name.split("."):
                return pattern
        return None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "double_quant": self.double_quant,
            "compute_dtype": None if self.compute_dtype is None else dtype_name(self.compute_dtype),
            "skip_modules": list(self.skip_modules),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """`to_dict`'s inverse. Raises ValueError for a field that does not exist."""
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"QuantConfig: unknown field {unknown[0]!r}; known are {list(cls.__dataclass_fields__)}")
        return cls(**values)


def as_bitsandbytes(config: QuantConfig, dtype: torch.dtype, left_modules: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a model's config.json, as readers of bitsandbytes' layout take it.

    Args:
        config: how the model was quantized; it stands in full under the key `MARK`, by which fourbit's own readers
            know the folder.
        dtype: compute dtype for readers that need one.
        left_modules: names of the modules that stay in 16 bit.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": config.quant_type,
        "bnb_4bit_use_double_quant": config.double_quant,
        "bnb_4bit_compute_dtype": dtype_name(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(left_modules),
        MARK: config.to_dict(),
    }


def as_compute_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    """A compute dtype from a dtype or its name. Raises ValueError or TypeError if it is no such thing."""
    if value is None:
        return None
    if isinstance(value, str):
        name = value.removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"compute_dtype {value!r} is not one of {', '.join(DTYPES)}")
        return DTYPES[name]
    if not isinstance(value, torch.dtype):
        raise TypeError(f"compute_dtype must be a torch.dtype or its name, got {type(value).__name__}")
    if value not in checks.COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype {value} is not one of {', '.join(DTYPES)}")
    return value
