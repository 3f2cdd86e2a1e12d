"""FourbitQuantizer: what transformers asks while it loads, saves and dequantizes a 4-bit model."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer

from fourbit.config import QuantConfig
from fourbit.functional import dequantize_4bit
from fourbit.nn import PackedModule
from fourbit.nn.packed import replacement
from fourbit.nn.quantize import plan_model
from fourbit_transformers import saving
from fourbit_transformers.config import METHOD, FourbitConfig
from fourbit_transformers.reading import Quantize, converter
from fourbit_transformers.rows import Packed

Places = dict[int, list[tuple[nn.Module, str]]]


class FourbitQuantizer(HfQuantizer):  # type: ignore[misc]
    """transformers' door to fourbit. `from_pretrained` makes one; `attach` gives one to a model quantized in memory.

    While a model loads, its modules are ordinary ones on the meta device. As each weight arrives, in 16 bit to be
    quantized, or packed from a folder, a 4-bit module takes the place of the one that it belongs to. What is 4-bit in
    a folder the folder's tensors say, not a list.
    """

    requires_calibration = False
    quantization_config: FourbitConfig

    def __init__(self, quantization_config: FourbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._planned: dict[str, QuantConfig] = {}
        self._places: Places = {}
        self._conversions: list[Any] | None = None
        self._originals: dict[int, Any] = {}
        self._returned: list[Any] = []

    # ---- what transformers asks before it loads ---------------------------------------------------------

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Nothing: fourbit runs wherever torch does."""

    def update_device_map(self, device_map: Any) -> Any:
        """The current accelerator where none is named, as with bitsandbytes."""
        if device_map is not None:
            return device_map
        if torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator()
            return {"": torch.device(device.type, torch.accelerator.current_device_index())} if device else None
        return {"": "cpu"}

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes an element, with the scales'."""
        config = self._planned.get(param_name)
        if config is None:
            return float(param.element_size())
        return 0.5 + (1 if config.double_quant else 4) / (config.blocksize or 64)

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether a parameter of the model is planned to be 4-bit."""
        return param_name in self._planned

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        planned = plan_model(model, self.quantization_config.quant)
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        tied |= set((getattr(model, "all_tied_weights_keys", None) or {}).values())
        # the device, and with it the default blocksize, is that of the weight when it arrives
        self._planned = {t.name: self.quantization_config.quant for t in planned.quantized if t.name not in tied}
        self._places = {}
        for parent in model.modules():
            for attribute, child in parent._modules.items():
                if child is not None:
                    self._places.setdefault(id(child), []).append((parent, attribute))

    def get_quantize_ops(self) -> Quantize:
        """What quantizes a planned weight on its arrival."""
        return Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """For a 4-bit folder: transformers' conversions, such that they collect packed weights with all they have."""
        if not self.pre_quantized:
            self._returned = weight_conversions
            return weight_conversions
        self._returned = []
        for each in weight_conversions:
            made = converter(self, each) if isinstance(each, WeightConverter) else each
            self._originals[id(made)] = each
            self._returned.append(made)
        self._returned.append(converter(self))
        return self._returned

    # ---- weights as they arrive -------------------------------------------------------------------------

    def quantized(self, model: nn.Module, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Put a 4-bit module in the place of the parameter `name`; returns its storage's tensors by full name."""
        owner, leaf, cls, replaced = _place(model, name)
        if isinstance(replaced, nn.Module):
            replaced._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
        else:
            replaced = weight
        new = cls.from_module(replaced, self._planned[name], name)
        self._put(owner, leaf, name, new)
        return _named(name, new, {n: t for n, t in (*new._parameters.items(), *new._buffers.items()) if t is not None})

    def unpacked(self, model: nn.Module, name: str, weight: Packed) -> dict[str, Tensor]:
        """The same for a weight that is packed already."""
        owner, leaf, cls, replaced = _place(model, name)
        quant, state = self.quantization_config.quant, weight.state
        config = QuantConfig(state.quant_type, state.blocksize, state.double_quant, quant.compute_dtype)
        dtype = owner._parameters[leaf].dtype  # type: ignore[union-attr]
        new = cls.empty(replaced, config, dtype, torch.device("meta"))
        if new.weight_shape != state.shape:
            raise ValueError(f"{name} has shape {list(state.shape)}, the model wants {list(new.weight_shape)}")
        self._put(owner, leaf, name, new)
        return _named(name, new, new.storage_of(*weight))

    def dequantized(self, weight: Packed) -> Tensor:
        """A packed weight in the dtype that it was quantized from."""
        return dequantize_4bit(weight.codes, weight.state)

    def _put(self, owner: nn.Module, leaf: str, name: str, new: PackedModule) -> None:
        whole = new.replaces is not nn.Parameter
        places = self._places.get(id(owner), []) if whole else [(owner, leaf)]
        if not places:
            raise ValueError(f"{name}: the model is itself a {type(owner).__name__}")
        with ExitStack() as undo:
            for parent, attribute in places:
                new.put(parent, attribute, undo)
            undo.pop_all()

    # ---- afterwards -------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name in self._planned:
            owner = model.get_submodule(name.rpartition(".")[0])
            weight = owner._parameters.get(name.rpartition(".")[2])
            if not self.pre_quantized and weight is not None and weight.device.type != "meta":
                # transformers made it itself (a new head), or in one operation with one that is not quantized
                for full, tensor in self.quantized(model, name, weight).items():
                    setattr(model.get_submodule(full.rpartition(".")[0]), full.rpartition(".")[2], tensor)
        used = model._weight_conversions if getattr(model, "_weight_conversions", None) is not None else []
        originals = self._originals if self.pre_quantized else {id(each): each for each in used}
        self._keep_conversions(model, [originals[id(each)] for each in used if id(each) in originals])
        self._returned[:] = [originals.get(id(each), each) for each in self._returned if id(each) in originals or
                             not isinstance(each, WeightConverter)]
        self._places, self._originals, self._returned = {}, {}, []
        finish(model, self.quantization_config)
        return model

    def _keep_conversions(self, model: Any, conversions: list[Any] | None) -> None:
        """What is saved has its names in files already: transformers is to convert nothing."""
        self._conversions = conversions
        model._weight_conversions = []

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """With fullgraph."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """The tensors as files have them, in bitsandbytes' layout; None where adapters alone are saved."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        saving.describe(model, self.quantization_config)
        return saving.state_dict(model, self._conversions), {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        from fourbit.nn.dequantize import dequantize_model

        return dequantize_model(model, dtype)

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """The model in 16 bit again; `dtype` None: its own."""
        conversions = self._conversions
        model = super().dequantize(model, dtype)
        model._weight_conversions = conversions
        return model


def attach(model: Any, config: QuantConfig) -> None:
    """Have transformers save and dequantize a model that was quantized in memory, as one that it loaded."""
    quantizer = FourbitQuantizer(FourbitConfig.of(config), pre_quantized=True)
    quantizer._keep_conversions(model, getattr(model, "_weight_conversions", None))
    model.hf_quantizer = quantizer
    model.is_quantized, model.quantization_method = True, METHOD
    model.config.quantization_config = quantizer.quantization_config
    model.config._is_quantized = True
    finish(model, quantizer.quantization_config)


def finish(model: Any, config: FourbitConfig) -> None:
    """What any 4-bit model of transformers gets, however it came to be."""


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str, type[PackedModule], nn.Module | Tensor]:
    """The owner of a parameter, its name there, what takes its place, and what makes place."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    found = replacement(owner, leaf)
    if found is None:
        raise ValueError(f"{name} is 4-bit, and the model's {type(owner).__name__} cannot hold it")
    return owner, leaf, *found


def _named(name: str, new: PackedModule, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = name if new.replaces is nn.Parameter else name.rpartition(".")[0]
    return {f"{prefix}.{own}": tensor for own, tensor in tensors.items()}
