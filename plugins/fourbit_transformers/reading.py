"""Reading a folder's tensors into a model: transformers' conversion operations that quantize, and that unpack.

Each makes a 4-bit module the moment its weight is complete and puts it into the model, so that at no time there is
more than one weight in 16 bit. The tensors of its storage go back to transformers, which places or offloads them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.utils import logging

from fourbit.state import QuantState
from fourbit_transformers.rows import Packed, Rows

_logger = logging.get_logger(__name__)

_META = "quant_state"
_COMPANIONS = {
    "absmax": r"\.absmax",
    "quant_map": r"\.quant_map",
    "nested_absmax": r"\.nested_absmax",
    "nested_quant_map": r"\.nested_quant_map",
    _META: r"\.quant_state\.bitsandbytes__\w+",
}
"""The tensors beside a packed weight, and what their names have behind the weight's."""

_WEIGHT = ""
"""And the weight itself."""


class Quantizer(Protocol):
    """What the operations need of the quantizer."""

    def param_needs_quantization(self, model: Any, param_name: str) -> bool: ...
    def quantized(self, model: nn.Module, name: str, weight: Tensor) -> dict[str, Tensor]: ...
    def unpacked(self, model: nn.Module, name: str, weight: Packed) -> dict[str, Tensor]: ...
    def dequantized(self, weight: Packed) -> Tensor: ...
    def as_wanted(self, model: nn.Module, name: str, tensor: Tensor) -> Tensor: ...


class _Shared(ConversionOps):
    """transformers copies converters deeply, once for each tensor; the quantizer and its model stay the same."""

    supports_many_to_many = True

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class Quantize(_Shared):
    """A 16-bit weight, as it arrives on its device, becomes a 4-bit module."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: Any = None, **_: Any
    ) -> Any:
        """`input_dict`: tensors of the model, by name; the planned ones are quantized."""
        found: dict[str, Tensor] = {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            tensor = value[0] if isinstance(value, list) else value
            if not self.hf_quantizer.param_needs_quantization(model, name):
                found[name] = tensor
                continue
            found |= self.hf_quantizer.quantized(model, name, tensor)
            if missing_keys is not None:
                missing_keys.discard(name)
        return found


class Unpack(_Shared):
    """Packed weights of a folder become 4-bit modules; what is not packed goes the way of transformers' operations.

    Args:
        hf_quantizer: whose model it is.
        operations: transformers' own between the folder and the model, such as stacking experts.
    """

    def __init__(self, hf_quantizer: Quantizer, operations: Sequence[ConversionOps] = ()) -> None:
        super().__init__(hf_quantizer)
        self.operations = list(operations)
        self.parts: dict[str, tuple[str, str]] = {}

    @property
    def reverse_op(self) -> ConversionOps:
        """None: what is saved is named by `saving`."""
        raise NotImplementedError("a packed weight is saved by fourbit's quantizer alone")

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str] | None = None,
        target_patterns: list[str] | None = None,
        full_layer_name: str = "",
        model: Any = None,
        missing_keys: Any = None,
        **more: Any,
    ) -> dict[str, Any]:
        """`input_dict`: lists of tensors by pattern, in the order of their names."""
        groups: dict[str, dict[str, list[Tensor]]] = {}
        for pattern in list(input_dict):
            source, part = self.parts[pattern]
            value = input_dict.pop(pattern)
            groups.setdefault(source, {})[part] = value if isinstance(value, list) else [value]
        if any(parts and _WEIGHT not in parts for parts in groups.values()):
            raise ValueError(f"{full_layer_name}: the folder has a 4-bit weight's scales without the weight")
        weights = {source: list(_weights(full_layer_name, parts)) for source, parts in groups.items()}
        arguments = {
            "source_patterns": list(dict.fromkeys(source for source, _ in self.parts.values())),
            "target_patterns": target_patterns,
            "full_layer_name": full_layer_name,
            "model": model,
            "missing_keys": missing_keys,
            **more,
        }
        found: dict[str, Any] = {}
        for name, value in self._arranged(weights, full_layer_name, arguments).items():
            if isinstance(value, Packed):
                found |= self.hf_quantizer.unpacked(model, name, value)
                if missing_keys is not None:
                    missing_keys.discard(name)
            else:
                found[name] = self.hf_quantizer.as_wanted(model, name, value)
        return found

    def _arranged(
        self, weights: dict[str, list[Tensor | Packed]], name: str, arguments: dict[str, Any]
    ) -> dict[str, Tensor | Packed]:
        """The model's tensors by full name, from those of the folder."""
        if not self.operations:
            (values,) = weights.values()
            return {name: values[0]}
        every = [each for values in weights.values() for each in values]
        if all(isinstance(each, Packed) for each in every):
            rows = Rows()
            stand_ins: dict[str, Any] = {
                source: [rows.stand_in(each) for each in values if isinstance(each, Packed)]
                for source, values in weights.items()
            }
            try:
                moved = self._run(stand_ins, name, arguments)
            except (RuntimeError, ValueError, IndexError):  # made for numbers, or for a row's elements
                moved = {}
            found = {each: rows.weight(tensor) for each, tensor in moved.items()}
            if moved and all(weight is not None for weight in found.values()):
                return {each: weight for each, weight in found.items() if weight is not None}
        packed = sum(isinstance(each, Packed) for each in every)
        if packed:
            _logger.warning_once(
                f"{name} stays in 16 bit: {packed} of the {len(every)} tensors that transformers makes it of are"
                " 4-bit weights, in a way in which they cannot be put together as they are"
            )
        dense: dict[str, Any] = {
            source: [self.hf_quantizer.dequantized(each) if isinstance(each, Packed) else each for each in values]
            for source, values in weights.items()
        }
        weights.clear()
        return dict(self._run(dense, name, arguments))

    def _run(self, tensors: dict[str, Any], name: str, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """transformers' operations, and the full names of what they give."""
        for operation in self.operations:
            tensors = operation.convert(tensors, **arguments)
        full = name.replace("*.", "0.")
        prefix, suffix = next(
            ((before, after) for key in tensors for before, _, after in [full.partition(key)] if key in full), ("", "")
        )
        return {prefix + key + suffix: v[0] if isinstance(v, list) else v for key, v in tensors.items()}


class _Collector(WeightConverter):
    """transformers makes a copy for each tensor that it meets: only what is collected must be its own."""

    __slots__ = ()

    def __init__(self, sources: list[str], targets: list[str], operation: Unpack) -> None:
        # not WeightConverter's: older ones let their own operations alone make many tensors of many
        WeightTransform.__init__(self, sources, targets)
        self.operations = [operation]
        if hasattr(WeightConverter, "force_cpu"):
            self.force_cpu = False

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightConverter:
        new = copy(self)
        new.collected_tensors, new.layer_targets = defaultdict(list), defaultdict(set)
        return new


def converters(hf_quantizer: Quantizer, original: WeightConverter) -> Iterator[WeightConverter]:
    """What collects the weights of one of transformers' converters, with the tensors beside them.

    A converter may name modules (`attn.Wqkv`) and mean all tensors in them: those beside a weight have `.weight.` in
    their names, so that their names become the model's as the weight's does by a converter of the weights alone.
    """
    if not all(source.removesuffix("$").endswith("weight") for source in original._original_source_patterns):
        yield converter(hf_quantizer, original, leaf="weight")
    yield converter(hf_quantizer, original)


def converter(hf_quantizer: Quantizer, original: WeightConverter | None = None, leaf: str = "") -> WeightConverter:
    """What collects weights and the tensors beside them: for one of transformers' converters, or for all else.

    `leaf` is the name of the tensors in modules that `original` names.
    """
    sources = [""] if original is None else list(original._original_source_patterns)
    targets = [""] if original is None else list(original._original_target_patterns)
    if leaf:
        sources = [rf"{source.removesuffix('$')}\.{leaf}" for source in sources]
        targets = [f"{target}.{leaf}" for target in targets]
    patterns, parts = [], []
    for part, suffix in (*_COMPANIONS.items(), (_WEIGHT, "")):  # longer ones first: the first that fits is taken
        for source in sources:
            end = "$" if suffix or leaf or not source else ""
            patterns.append(source.removesuffix("$") + suffix + end if end else source)
            parts.append(part)
    operation = Unpack(hf_quantizer, () if original is None else original.operations)
    made = _Collector(patterns, targets, operation)
    if original is not None:
        for name in ("scope_prefix", "base_model_prefix", "force_cpu"):
            if hasattr(original, name):
                setattr(made, name, getattr(original, name))
    plain = [""] if original is None else list(original.source_patterns)
    for i, pattern in enumerate(made.source_patterns):
        operation.parts[pattern] = (plain[i % len(plain)], parts[i])
    return made


def _weights(name: str, parts: Mapping[str, list[Tensor]]) -> Iterator[Tensor | Packed]:
    """The weights of one source, each packed or not, from the lists of their tensors."""
    rest = {part: iter(tensors) for part, tensors in parts.items()}
    states = _states(name, rest) if _META in parts else iter(())
    upcoming = next(states, None)
    for tensor in parts[_WEIGHT]:
        if upcoming is None or not _is_packed(tensor, upcoming):
            yield tensor
        else:
            yield Packed(tensor.contiguous().view(torch.uint8).reshape(-1), upcoming)
            upcoming = next(states, None)
    if upcoming is not None or any(next(left, None) is not None for part, left in rest.items() if part != _WEIGHT):
        raise ValueError(f"{name}: the folder has scales of a 4-bit weight that fit none of its tensors")


def _states(name: str, rest: Mapping[str, Iterator[Tensor]]) -> Iterator[QuantState]:
    for tensor in rest[_META]:
        meta = tensor.cpu()  # once, and not at each look
        text = bytes(meta.reshape(-1)[: 1 << 16].tolist())
        kind = next((kind for kind in _kinds(text)), "")
        entries = {f"quant_state.bitsandbytes__{kind}": meta.reshape(-1)}
        nested = b'"nested_offset"' in text
        for part in ("absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if nested else ())):
            found = next(rest.get(part, iter(())), None)
            if found is None:
                raise ValueError(f"{name}: the folder has a 4-bit weight without its {part}")
            entries[part] = found
        try:
            yield QuantState.from_state_dict(entries, prefix="")
        except (KeyError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error


def _kinds(text: bytes) -> Iterator[str]:
    """The data type that a state's JSON names; what is wrong with it QuantState says."""
    import json

    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(found, dict) and isinstance(found.get("quant_type"), str):
        yield found["quant_type"]


def _is_packed(tensor: Tensor, state: QuantState) -> bool:
    """Whether a tensor is the codes of `state`; beside packed weights there may be like ones in 16 bit."""
    return tensor.nbytes == (prod(state.shape) + 1) // 2 and tensor.shape != state.shape
