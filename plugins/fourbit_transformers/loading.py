"""Loading a folder in the bitsandbytes 4-bit layout (ours or bitsandbytes' own) into a transformers model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.checkpoint.reader import Checkpoint
from fourbit.config import as_compute_dtype
from fourbit.nn import PackedModule
from fourbit.nn.packed import replacement
from fourbit.nn.quantize import swap
from fourbit_transformers import experts
from fourbit_models.transformers import model_class


def load(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype | str | None = None,
) -> Any:
    """A transformers model from a folder with 4-bit (or plain) safetensors; in eval mode, on `device`.

    The model's class is the one that config.json names. Layers whose weights are 4-bit in the folder become
    fourbit modules, and no 16-bit copy of them is ever made. `compute_dtype` None follows the input's dtype.

    Raises CheckpointError or ValueError, naming the tensor, if folder and model do not fit, and ImportError
    if transformers is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("loading a model needs transformers: pip install 'fourbit[transformers]'") from error
    compute_dtype = as_compute_dtype(compute_dtype)
    checkpoint = Checkpoint(folder)
    folder = checkpoint.folder
    config = _config(transformers, checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers would ask for bitsandbytes
    model = _empty_model(transformers, config)
    packed_names, companions = checkpoint.quantized(), checkpoint.companions()
    stacked = experts.stacks(model, packed_names)
    parts = {name for names in stacked.values() for name in names}
    made: dict[str, PackedModule] = {}
    for name in [n for n in packed_names if n not in parts] + list(stacked):
        owner = _owner(model, name)
        found = replacement(owner, name.rpartition(".")[2])
        if found is None:
            raise ValueError(f"{name} is 4-bit, and the model's {type(owner).__name__} can't hold it")
        if name in stacked:
            packed, state = experts.read_stack(checkpoint, stacked[name], model.get_parameter(name).shape)
        else:
            packed, state = checkpoint.read_4bit(name)
        cls, replaced = found
        made[name] = cls.from_state(packed, state, replaced, name, device=device, compute_dtype=compute_dtype)
    swap(model, made)
    for name in checkpoint.entries:
        if name not in packed_names and name not in companions:
            _put_plain(model, name, checkpoint.read(name).to(device))
    model.tie_weights()
    missing = [name for name, tensor in model.named_parameters() if tensor.device.type == "meta"]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{folder} lacks {missing[0]!r}{more}, which {type(model).__name__} has")
    model.to(device)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


def _config(transformers: Any, checkpoint: Checkpoint) -> Any:
    """The model's configuration. Code in the folder is never run, and never asked about."""
    found = checkpoint.config  # read by fourbit first: it follows no link out of the folder
    kind = found.get("model_type")
    known = isinstance(kind, str) and kind in transformers.CONFIG_MAPPING
    if "auto_map" in found and not known:
        raise ValueError(
            f"{checkpoint.folder} needs code of its own (auto_map in its config.json), and transformers has no model"
            f" {kind!r}: fourbit runs no code that comes with a folder. Load it with transformers itself, with"
            " trust_remote_code=True, if you trust it"
        )
    return transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)


def _empty_model(transformers: Any, config: Any) -> Any:
    """The model with its parameters on the meta device and its buffers real."""
    from transformers.initialization import no_init_weights

    names = getattr(config, "architectures", None) or []
    classes = (model_class(transformers, name) for name in names if isinstance(name, str))
    cls = next((c for c in classes if c is not None), None)
    if cls is None:
        raise ValueError(f"config.json names no architecture that transformers has: {names}")
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _meta_parameters(), no_init_weights():
            return cls(config)
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Parameters that are registered inside go to the meta device at once: no more than one is ever held."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _put_plain(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set an ordinary parameter or buffer."""
    owner, leaf = _owner(model, name), name.rpartition(".")[2]
    for table in (owner._parameters, owner._buffers):
        present = table.get(leaf)
        if present is None:
            continue
        if present.shape != tensor.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, the model wants {list(present.shape)}")
        if table is owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        else:
            owner._buffers[leaf] = tensor
        return
    raise ValueError(f"{name} is in the folder, and {type(model).__name__} has no such tensor")


def _owner(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        raise ValueError(f"{name} is in the folder, and {type(model).__name__} has no such module") from None
