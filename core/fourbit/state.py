"""QuantState: the metadata that travels with a packed weight, and its form in a state dict.

The state-dict form is the one of bitsandbytes, which transformers, peft and vLLM read. A state dict is
input from a stranger: everything is checked before it is used, and an error names the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from fourbit import checks, codebooks, scales
from fourbit.scales import NESTED_BLOCKSIZE
from fourbit.weight import Weight, check_scales

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Names of the dtypes in files, and in configurations."""

MAX_META_BYTES = 1 << 16
_FLOAT32_END = 2**128 - 2**103  # from here on a number becomes inf in float32
_META_PREFIX = "quant_state.bitsandbytes__"
_PLAIN_KEYS = ("absmax", "quant_map")
_NESTED_KEYS = ("nested_absmax", "nested_quant_map")
_META_FIELDS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_FIELDS = {"nested_blocksize", "nested_dtype", "nested_offset"}


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in files: "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def quantized_nbytes(count: int, blocksize: int, nested: bool) -> int:
    """Bytes of `count` elements in 4 bits: codes, scales, and if these are `nested` their scales and offset.

    The code tables are constants and not counted.
    """
    blocks = -(-count // blocksize)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCKSIZE) + 4 if nested else 4 * blocks
    return (count + 1) // 2 + scales


@dataclass(frozen=True, eq=False)
class QuantState:
    """What is needed to read a packed 4-bit weight of n elements, b = ceil(n/blocksize) blocks.

    Attributes:
        absmax: the scales: float32 [b], or uint8 [b] if double-quantized.
        shape: of the weight.
        code: the codebook's values, float32 [16].
        blocksize: elements that share a scale.
        quant_type: the codebook's name: "nf4", "fp4", or one that a plugin registered.
        dtype: that was quantized, and that `dequantize_4bit` returns by default.
        nested_absmax: float32 [ceil(b/256)] if double-quantized, else None; likewise
        nested_code: float32 [256], the 8-bit codebook, and
        nested_offset: float32 scalar, the mean of the scales.

    Raises TypeError or ValueError, naming the field, if the fields do not fit each other.
    """

    absmax: Tensor
    shape: torch.Size
    code: Tensor
    blocksize: int
    quant_type: str
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        checks.blocksize("QuantState", self.blocksize)
        checks.compute_dtype("QuantState", self.dtype)
        count = self.numel
        if count < 1:
            raise ValueError(f"QuantState: shape {list(self.shape)} has no elements")
        nested = (self.nested_absmax, self.nested_code, self.nested_offset)
        check_scales("QuantState", count, self.device, self.absmax, self.code, self.blocksize, *nested)

    def weight(self, packed: Tensor) -> Weight:
        """`packed` with these scales, as backends take it."""
        nested = (self.nested_absmax, self.nested_code, self.nested_offset)
        return tuple.__new__(Weight, (packed, self.absmax, self.code, self.blocksize, *nested))

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return prod(self.shape)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """Where the scales lie, and the packed weight should."""
        return self.absmax.device

    @property
    def nbytes(self) -> int:
        """Bytes of the weight in 4 bits, as `quantized_nbytes` counts them."""
        return quantized_nbytes(self.numel, self.blocksize, self.double_quant)

    @property
    def bits_per_parameter(self) -> float:
        """Bits a parameter, scales included."""
        return 8 * self.nbytes / self.numel

    def scales(self) -> Tensor:
        """The scales as float32 [b], decoded if they are double-quantized."""
        return scales.decode(self.absmax, self.nested_absmax, self.nested_code, self.nested_offset)

    def to(self, device: torch.device | str) -> QuantState:
        """The same state with its tensors on `device`."""
        moved = {name: None if t is None else t.to(device) for name, t in self._tensors().items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def _tensors(self) -> dict[str, Tensor | None]:
        return {
            "absmax": self.absmax,
            "code": self.code,
            "nested_absmax": self.nested_absmax,
            "nested_code": self.nested_code,
            "nested_offset": self.nested_offset,
        }

    def to_state_dict(self, prefix: str = "weight.") -> dict[str, Tensor]:
        """The state as tensors named as bitsandbytes names them, each with `prefix` in front.

        The packed weight itself belongs beside them, under the prefix without its last dot. Raises ValueError for
        scales in a format that those files do not have.
        """
        meta: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": dtype_name(self.dtype),
            "shape": list(self.shape),
        }
        tensors = {"absmax": self.absmax, "quant_map": self.code}
        if self.nested_absmax is not None:
            assert self.nested_code is not None and self.nested_offset is not None
            if bool((self.nested_code.abs() > 1).any()):  # NaN stands for blocks that are not finite
                raise ValueError(
                    f"{prefix}nested_quant_map: the scales' table goes beyond [-1, 1], which is no format of"
                    " bitsandbytes' files; store the decoded scales, `state.scales()`"
                )
            tensors |= {"nested_absmax": self.nested_absmax, "nested_quant_map": self.nested_code}
            meta |= {
                "nested_blocksize": NESTED_BLOCKSIZE,
                "nested_dtype": "float32",
                "nested_offset": float(self.nested_offset),
            }
        data = bytearray(json.dumps(meta).encode())
        tensors[_META_PREFIX + self.quant_type] = torch.frombuffer(data, dtype=torch.uint8)
        return {prefix + name: tensor for name, tensor in tensors.items()}

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        prefix: str = "weight.",
        device: torch.device | str | None = None,
    ) -> QuantState:
        """Read the state back from a state dict, whose other keys do not matter. `to_state_dict`'s inverse.

        Tensors go to `device` (None: stay where they are). Raises KeyError for a missing entry and ValueError
        for an extra, malformed or contradictory one, naming the key.
        """
        entries = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
        meta_keys = [name for name in entries if name.startswith(_META_PREFIX)]
        if len(meta_keys) != 1:
            found = ", ".join(sorted(prefix + name for name in meta_keys)) or "none"
            raise KeyError(f"want exactly one key {prefix}{_META_PREFIX}<quant_type>, found {found}")
        meta_key = meta_keys[0]
        meta = parse_meta(prefix + meta_key, entries[meta_key])
        try:
            codebook = codebooks.get(meta["quant_type"])
        except ValueError as error:
            raise ValueError(f"{prefix}{meta_key}: {error}") from None
        if codebook.name != meta_key.removeprefix(_META_PREFIX):
            raise ValueError(f"{prefix}{meta_key}: its JSON says quant_type {codebook.name!r}")
        nested = "nested_offset" in meta
        wanted = (*_PLAIN_KEYS, *(_NESTED_KEYS if nested else ()))
        for name in wanted:
            if name not in entries:
                raise KeyError(f"{prefix}{name} is missing")
        extra = sorted(set(entries) - set(wanted) - {meta_key})
        if extra:
            raise ValueError(f"unexpected key {prefix}{extra[0]} beside a 4-bit weight")
        return cls._assemble(prefix, entries, meta, codebook, device)

    @classmethod
    def _assemble(
        cls,
        prefix: str,
        entries: Mapping[str, Tensor],
        meta: dict[str, Any],
        codebook: codebooks.Codebook,
        device: torch.device | str | None,
    ) -> QuantState:
        count = prod(meta["shape"])
        blocks = -(-count // meta["blocksize"])
        nested = "nested_offset" in meta
        absmax = _expect(prefix, entries, "absmax", torch.uint8 if nested else torch.float32, blocks)
        target = absmax.device if device is None else torch.device(device)
        quant_map = _expect(prefix, entries, "quant_map", torch.float32, 16)
        # The type's name decides: other readers look at nothing else. Old files differ by rounding.
        if not torch.allclose(quant_map.cpu(), codebook.tensor(), rtol=0, atol=1e-6):
            raise ValueError(f"{prefix}quant_map is not the table of quant_type {codebook.name!r}")
        parts: dict[str, Tensor] = {}
        if nested:
            nested_map = _expect(prefix, entries, "nested_quant_map", torch.float32, 256)
            if not bool(torch.isfinite(nested_map).all()):
                raise ValueError(f"{prefix}nested_quant_map has values that are not finite")
            groups = -(-blocks // NESTED_BLOCKSIZE)
            nested_absmax = _expect(prefix, entries, "nested_absmax", torch.float32, groups)
            parts = {
                "nested_absmax": nested_absmax.reshape(-1).to(target),
                "nested_code": nested_map.reshape(-1).to(target),
                "nested_offset": torch.tensor(meta["nested_offset"], dtype=torch.float32, device=target),
            }
        return cls(
            absmax=absmax.reshape(-1).to(target),
            shape=torch.Size(meta["shape"]),
            code=codebook.tensor(target),
            blocksize=meta["blocksize"],
            quant_type=codebook.name,
            dtype=DTYPES[meta["dtype"]],
            **parts,
        )


def _expect(prefix: str, entries: Mapping[str, Tensor], name: str, dtype: torch.dtype, count: int) -> Tensor:
    tensor = entries[name]
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.numel() != count:
        got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{prefix}{name}: want {dtype} with {count} elements, got {got}")
    return tensor


def parse_meta(key: str, tensor: Tensor) -> dict[str, Any]:
    """The JSON of the quantization state, with every field checked."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ValueError(f"{key}: want a 1-D uint8 tensor of JSON text")
    if tensor.numel() > MAX_META_BYTES:
        raise ValueError(f"{key}: {tensor.numel()} bytes of JSON, more than {MAX_META_BYTES}")
    try:
        meta = json.loads(
            bytes(tensor.tolist()).decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: not valid JSON: {error}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{key}: want a JSON object, got {type(meta).__name__}")
    fields = _META_FIELDS | (_NESTED_FIELDS if _NESTED_FIELDS & set(meta) else set())
    missing, extra = sorted(fields - set(meta)), sorted(set(meta) - fields)
    if missing or extra:
        raise ValueError(f"{key}: missing fields {missing}, unknown fields {extra}")
    shape = meta["shape"]
    sizes_ok = isinstance(shape, list) and 0 < len(shape) <= 8 and all(type(s) is int and s > 0 for s in shape)
    if not sizes_ok or prod(shape) >= 2**62:
        raise ValueError(f"{key}: shape {_short(shape)} is not a list of positive sizes")
    for field in ("quant_type", "dtype"):
        if not isinstance(meta[field], str):
            raise ValueError(f"{key}: {field} {_short(meta[field])} is not a string")
    if meta["dtype"] not in DTYPES:
        raise ValueError(f"{key}: dtype {_short(meta['dtype'])} is not one of {', '.join(DTYPES)}")
    try:
        checks.blocksize(key, meta["blocksize"])
    except TypeError as error:
        raise ValueError(str(error)) from None
    if "nested_offset" in meta:
        if meta["nested_blocksize"] != NESTED_BLOCKSIZE or meta["nested_dtype"] != "float32":
            raise ValueError(f"{key}: nested_blocksize must be {NESTED_BLOCKSIZE} and nested_dtype float32")
        offset = meta["nested_offset"]
        if type(offset) not in (int, float) or not abs(offset) < _FLOAT32_END:
            raise ValueError(f"{key}: nested_offset {_short(offset)} is not a finite float32")
    return meta


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which no name is there twice: readers differ in which one they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has a name twice in an object")
    return found


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
