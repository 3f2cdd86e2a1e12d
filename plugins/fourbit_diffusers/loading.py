"""What a file holds, translated into what 4-bit modules hold: one tensor at a time, as diffusers reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fourbit.checkpoint.plan import plan
from fourbit.checkpoint.reader import META_MARK
from fourbit.config import QuantConfig
from fourbit.functional import quantize_4bit, require_finite
from fourbit.nn.packed import PackedModule, replacement
from fourbit.nn.quantize import swap
from fourbit.nn.storage import STORAGE
from fourbit.state import QuantState, parse_meta


def renamed(model: Any, names: tuple[str, ...]) -> dict[str, str]:
    """What diffusers calls the tensors `names` of a folder once they are read: old files have other names."""
    fixed = model._fix_state_dict_keys_on_load({name: name for name in names})
    return {old: new for new, old in fixed.items()}


@dataclass
class _Stored:
    """A 4-bit weight of the folder: its name there, how it is quantized, and the names of all its parts."""

    name: str
    config: QuantConfig
    parts: list[str]


class Incoming:
    """The weights on their way into one model.

    Attributes:
        device_map: where diffusers puts what; None: on the CPU.
        prepared: whether the model has its 4-bit modules already.
    """

    def __init__(self) -> None:
        self.device_map: Mapping[str, Any] | None = None
        self.prepared = False
        self._keys: list[str] = []
        self._stored: dict[str, _Stored] = {}  # by the folder's name of the weight
        self._owner: dict[str, str] = {}  # of each part, under the names it may come by: the weight it belongs to
        self._modules: dict[str, tuple[str, PackedModule]] = {}  # by the model's name of the weight: where, and what
        self._dtype = torch.float32
        self._here: dict[str, dict[str, Tensor]] = {}  # parts whose weight is not complete yet

    def open(self, keys: Sequence[str], files: Sequence[Any]) -> list[str]:
        """Take note of a folder's tensors; returns the list of their names, without the parts of 4-bit weights.

        Reads no more than how each 4-bit weight is quantized. `prepare` brings the list that is returned up to date.
        """
        weights = [key.partition(META_MARK)[0] for key in keys if META_MARK in key]
        if weights:
            self._stored = _described(keys, weights, files)
            self._owner = {part: weight for weight, stored in self._stored.items() for part in stored.parts}
        self._keys = [key for key in keys if self._owner.get(key, key) == key]
        return self._keys

    def prepare(self, model: Any, config: QuantConfig, dtype: torch.dtype, device_map: Any) -> None:
        """Put 4-bit modules without values into `model`, which is on the meta device."""
        if self._stored:
            made = self._as_stored(model, config)
        else:
            made = _as_planned(model, config, _main_device(device_map))
        swap(model, made)
        places = {
            name: name.rpartition(".")[0] if new.replaces is not nn.Parameter else name for name, new in made.items()
        }
        self._modules = {name: (places[name], new) for name, new in made.items()}
        self._dtype = dtype
        # in place: diffusers compares this very list with what the model has
        self._keys[:] = [new for key in self._keys for new in self._names(key)]
        self.prepared = True

    def _as_stored(self, model: Any, config: QuantConfig) -> dict[str, PackedModule]:
        new_names = renamed(model, tuple(self._stored))
        made = {}
        for old, stored in list(self._stored.items()):
            name = new_names[old] if new_names[old] in self._keys else old
            self._owner[name] = old
            stored.name = name
            owner_name, _, leaf = name.rpartition(".")
            try:
                found = replacement(model.get_submodule(owner_name), leaf)
            except AttributeError:
                found = None
            if found is None:
                raise ValueError(f"{name} is 4-bit in the folder, and the model has no layer that can hold it so")
            cls, replaced = found
            made[name] = cls.from_module(replaced, replace(stored.config, compute_dtype=config.compute_dtype), name)
        return made

    def _names(self, key: str) -> list[str]:
        """The names that the model has for the tensor `key` of the folder."""
        if key not in self._modules:
            return [key]
        place, module = self._modules[key]
        tensors = {**module._parameters, **module._buffers}
        return [f"{place}.{name}" for name in STORAGE if tensors.get(name) is not None]

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What one file holds, by the model's names: 4-bit modules' tensors in the place of their weights.

        A 4-bit weight comes when the last of its parts does, which may be in another file. Raises NonFiniteError or
        ValueError, naming the tensor.
        """
        out: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            weight = self._owner.get(name)
            if weight is not None:
                stored = self._stored[weight]
                parts = self._here.setdefault(weight, {})
                parts[weight if name == stored.name else name] = tensor
                if len(parts) == len(stored.parts):
                    out |= self._read(stored.name, weight, self._here.pop(weight))
            elif name in self._modules:
                out |= self._quantized(name, tensor)
            else:
                out[name] = tensor
        return out

    def _read(self, name: str, weight: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parts of a 4-bit weight, checked, as tensors of its module."""
        place, module = self._modules.pop(name)
        state = QuantState.from_state_dict(parts, weight + ".", device=_device_of(name, self.device_map))
        # other storage dtypes hold the same bytes
        packed = parts[weight].contiguous().view(-1).view(torch.uint8)[: (state.numel + 1) // 2]
        try:
            storage = module.storage_of(packed.to(state.device), state)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return _delivered(place, module, storage)

    def _quantized(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A 16-bit weight, quantized where it is going to be, as tensors of its module."""
        place, module = self._modules.pop(name)
        if tensor.shape != module.weight_shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, the model wants {list(module.weight_shape)}")
        tensor = tensor.to(_device_of(name, self.device_map)).to(self._dtype)
        require_finite(tensor, name)
        packed, state = quantize_4bit(
            tensor, quant_type=module.quant_type, blocksize=module.blocksize, double_quant=module.double_quant
        )
        return _delivered(place, module, module.storage_of(packed, state))

    def require_all(self) -> None:
        """Raise ValueError, naming the first, if a 4-bit module has not got its weight."""
        for weight, parts in self._here.items():
            missing = next(part for part in self._stored[weight].parts if part not in parts)
            raise ValueError(f"{missing}, a part of a 4-bit weight, is missing from the folder")
        if self._modules:
            more = f" and {len(self._modules) - 1} more" if len(self._modules) > 1 else ""
            raise ValueError(
                f"{next(iter(self._modules))}{more}: the folder has no such weight, and the model wants it"
            )


def _delivered(place: str, module: PackedModule, storage: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a 4-bit weight that diffusers is to put into the model; the small tables are put there here.

    They are buffers, which accelerate wants to find on a device even where the parameters are offloaded to disk.
    """
    out = {}
    for name, tensor in storage.items():
        if name in module._buffers:
            setattr(module, name, tensor.clone())
        else:
            out[f"{place}.{name}"] = tensor
    return out


def _described(keys: Sequence[str], weights: Sequence[str], files: Sequence[Any]) -> dict[str, _Stored]:
    """The 4-bit weights of a folder, by name."""
    parts: dict[str, list[str]] = {weight: [weight] for weight in weights}
    for key in keys:
        weight = key.partition(META_MARK)[0] if META_MARK in key else key.rpartition(".")[0]
        if weight in parts:
            parts[weight].append(key)
    if not files:
        raise ValueError("from_single_file reads models in 16 bit; open a 4-bit folder with from_pretrained")
    found = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{file}: 4-bit weights are read from safetensors")
        with safe_open(str(file), framework="pt") as handle:
            for key in handle.keys():
                if META_MARK in key:
                    weight = key.partition(META_MARK)[0]
                    found[weight] = _Stored(weight, _config_of(key, handle.get_tensor(key)), parts[weight])
    return found


def _config_of(key: str, tensor: Tensor) -> QuantConfig:
    meta = parse_meta(key, tensor)
    return QuantConfig(meta["quant_type"], meta["blocksize"], "nested_offset" in meta)


def _as_planned(model: nn.Module, config: QuantConfig, device: torch.device) -> dict[str, PackedModule]:
    """Modules for what `fourbit.plan` quantizes, without values."""
    steps = plan(model, config, device=device)
    if not steps.quantized:
        raise ValueError(f"{type(model).__name__}: FourbitConfig quantizes nothing of it:\n{steps}")
    config = replace(config, blocksize=steps.blocksize)
    made = {}
    for step in steps.quantized:
        found = replacement(model.get_submodule(step.module), step.name.rpartition(".")[2])
        assert found is not None  # by the walk that the plan is made of
        cls, replaced = found
        made[step.name] = cls.from_module(replaced, config, step.name)
    return made


def _main_device(device_map: Any) -> torch.device:
    """Where most of a model is to be: the first device of the map that is none of storage only."""
    if isinstance(device_map, Mapping):
        devices = [_device(place) for place in device_map.values() if place != "disk"]
        return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    if device_map is not None and torch.accelerator.is_available():  # "auto" and its like
        return torch.device(torch.accelerator.current_accelerator() or "cpu")
    return torch.device("cpu")


def _device_of(name: str, device_map: Mapping[str, Any] | None) -> torch.device:
    """Where the tensor `name` goes, as diffusers looks it up; what goes to disk is quantized on the CPU."""
    while device_map is not None and name and name not in device_map:
        name = name.rpartition(".")[0]
    place = (device_map or {}).get(name, "cpu")
    return torch.device("cpu") if place == "disk" else _device(place)


def _device(place: Any) -> torch.device:
    if isinstance(place, int):
        accelerator = torch.accelerator.current_accelerator()
        return torch.device("cpu" if accelerator is None else accelerator.type, place)
    return torch.device(place)
