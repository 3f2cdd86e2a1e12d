"""The quantizer: what diffusers calls while it loads and saves a model."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from fourbit import checks
from fourbit.config import QuantConfig
from fourbit.nn.packed import PackedModule
from fourbit_diffusers.config import FourbitConfig
from fourbit_diffusers.loading import Incoming
from fourbit_diffusers.saving import in_bitsandbytes_layout


class FourbitQuantizer(DiffusersQuantizer):
    """Loads models of diffusers in 4 bits, on the fly or from folders in the bitsandbytes layout, and saves them so.

    4-bit modules without values take their places before anything is read. Of each file that diffusers reads, what
    belongs to them is translated, a tensor at a time, into the tensors that they hold; the rest is diffusers' work.
    """

    use_keep_in_fp32_modules = True
    quantization_config: FourbitConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        # one of its own: configurations are shared by models, and this one gets to know its model
        super().__init__(FourbitConfig.of(quantization_config), **kwargs)
        self._incoming = Incoming()
        self._dtype = torch.float32
        self._model: Any = None
        self.beside_another = False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Called before and after diffusers has worked out which part of the model goes to which device."""
        if isinstance(device_map, Mapping):
            self._incoming.device_map = device_map

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """As it was saved, unless the caller says another; float32 for what was never quantized, as in diffusers."""
        dtype = torch_dtype or self.quantization_config.dtype or torch.float32
        if dtype not in checks.COMPUTE_DTYPES:
            raise ValueError(f"torch_dtype {dtype}: 4-bit layers compute in float32, bfloat16 or float16")
        self._dtype = dtype
        return dtype

    # ---- loading ------------------------------------------------------------------------------------

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """The names of what the folder holds; which of them belong to 4-bit weights, and what these are like."""
        return self._incoming.open(loaded_keys, checkpoint_files)

    def _process_model_before_weight_loading(
        self, model: nn.Module, device_map: Any = None, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        if state_dict is not None:  # from_single_file hands over what it has read
            self._incoming.open(list(state_dict), ())
        self._incoming.prepare(model, self.quantization_config.quant, self._dtype, device_map)
        self._attach(model, self._dtype)
        if state_dict is not None:
            translated = self._incoming.translate(state_dict)
            state_dict.clear()
            state_dict.update(translated)

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What one file holds, in the names and the form that the model has it; quantized here where it is not yet."""
        if not self._incoming.prepared:
            return state_dict  # of from_single_file, which knows its model later
        return self._incoming.translate(state_dict)

    @property
    def supports_parallel_loading(self) -> bool:
        """No: the parts of one weight may be in two files, and one tensor at a time keeps the peak low."""
        return False

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._incoming.require_all()
        self._incoming = Incoming()
        for module in model.modules():
            if isinstance(module, PackedModule):
                module._freeze()  # accelerate puts new tensors into modules past their __setattr__
        return model

    # ---- saving -------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The model's state dict in the bitsandbytes layout. Raises ValueError for what cannot be read back."""
        if not safe_serialization:
            raise ValueError("4-bit weights are saved as safetensors: leave safe_serialization at True")
        model = self._model() if self._model is not None else None
        if model is None:
            raise ValueError("the model that this quantizer was made for is gone; reload it to save it")
        return in_bitsandbytes_layout(model, state_dict), {}

    @property
    def is_serializable(self) -> bool:
        """Yes; but for a model that another quantizer has layers in, too: no folder could say so."""
        return not self.beside_another

    @property
    def is_trainable(self) -> bool:
        """Yes: adapters, through the frozen weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Yes, with fullgraph."""
        return True

    # ---- the model ----------------------------------------------------------------------------------

    def attach_quantized(self, model: Any, dtype: torch.dtype) -> None:
        """Make `model`, whose layers are in 4 bits already, look as if it had been loaded with this quantizer."""
        other = getattr(model, "hf_quantizer", None)
        self.beside_another = other is not None and not isinstance(other, FourbitQuantizer)
        model.is_quantized, model.quantization_method = True, self.quantization_config.quant_method
        self._attach(model, dtype)
        model.hf_quantizer = self

    def _attach(self, model: Any, dtype: torch.dtype) -> None:
        config = self.quantization_config
        config.dtype = dtype
        packed = [module for module in model.modules() if isinstance(module, PackedModule)]
        if config.quant.blocksize is None and packed:
            config.quant = replace(config.quant, blocksize=packed[0].blocksize)
        config.left_modules = tuple(_left(model))
        self._model = weakref.ref(model)  # weakly, or the model would be freed by the garbage collector alone
        model.register_to_config(quantization_config=config)

    def _dequantize(self, model: Any) -> Any:
        from fourbit.nn.dequantize import dequantize_model

        found = dequantize_model(model)
        model.hf_quantizer = self  # which diffusers takes away itself, and fails where it is gone
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": self._model and self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["_model"]  # a copy's is the copied model
        self.__dict__.update(state, _model=None if model is None else weakref.ref(model))


def attach(model: Any, config: QuantConfig) -> None:
    """Have diffusers save and dequantize a model that was quantized in memory, as one that it loaded."""
    packed = next((module for module in model.modules() if isinstance(module, PackedModule)), None)
    if packed is not None:
        FourbitQuantizer(config).attach_quantized(model, packed.dtype)


def detach(model: Any) -> None:
    """Have diffusers save a model as the 16-bit one that it is again."""
    if not isinstance(getattr(model, "hf_quantizer", None), FourbitQuantizer):
        return
    del model.hf_quantizer
    model.is_quantized, model.quantization_method = False, None
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    del model._internal_dict
    model.register_to_config(**config)


def _left(model: nn.Module) -> Sequence[str]:
    """The linear layers in 16 bit, as diffusers' bitsandbytes loader wants to be told of them: by whole names."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, PackedModule)
    ]
