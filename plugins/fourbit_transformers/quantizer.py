"""FourbitQuantizer: what transformers asks while it loads, saves and dequantizes a 4-bit model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, build_glob_alternation
from transformers.quantizers.base import HfQuantizer

from fourbit.checkpoint.quantize import require_work
from fourbit.config import QuantConfig
from fourbit.dispatch import default_blocksize
from fourbit.functional import dequantize_4bit
from fourbit.nn import ExpertWeights4bit, PackedModule
from fourbit.nn.dequantize import dequantize_model
from fourbit.nn.packed import replacement
from fourbit.nn.quantize import module_places, plan_model
from fourbit.state import QuantState
from fourbit_transformers import saving
from fourbit_transformers.config import METHOD, FourbitConfig
from fourbit_transformers.experts import use_fourbit_experts
from fourbit_transformers.reading import Quantize, converter, converters
from fourbit_transformers.rows import Packed
from fourbit_transformers.tensor_parallel import Plan

K_BIT = "hqq_quantized"
"""What peft's `prepare_model_for_kbit_training` knows a model by that is to be trained with gradient checkpointing.

It has a list of methods, and this is the one mark on it that nobody else reads: `is_loaded_in_4bit` makes transformers
import bitsandbytes, and peft refuse to merge. Norms then stay in 16 bit, as for all methods but bitsandbytes.
"""

Places = dict[int, list[tuple[nn.Module, str]]]


class FourbitQuantizer(HfQuantizer):
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
        self._dtypes: list[tuple[re.Pattern[str], torch.dtype]] | None = None
        self._conversions: list[Any] | None = None
        self._originals: dict[int, Any] = {}
        self._returned: list[Any] = []
        self._parallel = Plan()

    # ---- what transformers asks before it loads ---------------------------------------------------------

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """fourbit runs wherever torch does. Raises NotImplementedError under DeepSpeed's ZeRO-3."""
        from transformers.integrations import deepspeed

        if deepspeed.is_deepspeed_zero3_enabled():  # type: ignore[no-untyped-call]
            raise NotImplementedError(
                "DeepSpeed's ZeRO-3 is not supported with 4-bit weights, which it would partition as numbers: shard the"
                " model with FSDP2 (fsdp=True and fsdp_config={'version': 2} in TrainingArguments), or use ZeRO-2"
            )

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

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if self.pre_quantized:
            _require_files_of_ours(checkpoint_files or [])
        planned = plan_model(model, self.quantization_config.quant)
        if not self.pre_quantized:
            require_work(planned)
        # the device, and with it the default blocksize, is that of the weight when it arrives
        self._planned = {t.name: self.quantization_config.quant for t in planned.quantized}
        self._places = module_places(model)
        self._parallel.take(model, [t.name for t in planned.quantized])

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
            for made in converters(self, each) if isinstance(each, WeightConverter) else (each,):
                self._originals[id(made)] = each
                self._returned.append(made)
        self._returned.append(converter(self))
        return self._returned

    # ---- weights as they arrive -------------------------------------------------------------------------

    def quantized(self, model: nn.Module, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Put a 4-bit module in the place of the parameter `name`; returns its storage's parameters by full name."""
        self._parallel.require_whole(model, name)
        config = self._planned[name]
        config = replace(config, blocksize=config.blocksize or default_blocksize(weight.device))
        new = self._put(model, name, config, weight.dtype)
        return self._filled(name, new, new.encoded(type(new).as_held(weight, name), name))

    def unpacked(self, model: nn.Module, name: str, weight: Packed) -> dict[str, Tensor]:
        """The same for a weight that is packed already; where no 4-bit module can be, it is decoded.

        Other tools pack routers, too, which transformers holds in modules of their own.
        """
        self._parallel.require_whole(model, name)
        quant, state = self.quantization_config.quant, weight.state
        owner_name, _, leaf = name.rpartition(".")
        if replacement(model.get_submodule(owner_name), leaf) is None:
            return {name: self.as_wanted(model, name, dequantize_4bit(*weight))}
        config = QuantConfig(state.quant_type, state.blocksize, state.double_quant, quant.compute_dtype)
        new = self._put(model, name, config)
        if new.weight_shape != state.shape:
            raise ValueError(f"{name} has shape {list(state.shape)}, the model wants {list(new.weight_shape)}")
        return self._filled(name, new, weight)

    def _put(self, model: nn.Module, name: str, config: QuantConfig, dtype: torch.dtype | None = None) -> PackedModule:
        """An empty 4-bit module, in the place of the parameter `name`; `dtype` None: the parameter's."""
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        found = replacement(owner, leaf)
        assert found is not None  # by the plan, or by `unpacked`
        cls, replaced = found
        held = owner._parameters[leaf]
        new = cls.empty(replaced, config, dtype or held.dtype, "meta")  # type: ignore[union-attr]
        places = self._places.get(id(owner), []) if new.replaces is not nn.Parameter else [(owner, leaf)]
        if not places:
            raise ValueError(f"{name}: the model is itself a {type(owner).__name__}")
        with ExitStack() as undo:
            for parent, attribute in places:
                new.put(parent, attribute, undo)
            undo.pop_all()
        return new

    def _filled(self, name: str, new: PackedModule, weight: tuple[Tensor, QuantState]) -> dict[str, Tensor]:
        """Give it its tables; the parameters, by full name, transformers puts in, or on a disk."""
        storage = new.storage_of(*weight)
        if self._stays_on_host(new, weight[0].device):
            storage = {own: tensor.to("cpu") for own, tensor in storage.items()}
        for own in [own for own in storage if own in new._buffers]:
            setattr(new, own, storage.pop(own))
        prefix = name if new.replaces is nn.Parameter else name.rpartition(".")[0]
        return {f"{prefix}.{own}": tensor for own, tensor in storage.items()}

    def _stays_on_host(self, new: PackedModule, device: torch.device) -> bool:
        """Whether it is a stack of experts to offload; from then on `.to(device)` leaves it where it is."""
        if not (self.quantization_config.offload_experts and isinstance(new, ExpertWeights4bit)):
            return False
        from fourbit_transformers.expert_offload import gains, prepare
        from fourbit_transformers.expert_stream import Streamer

        if gains(device):
            prepare(new, Streamer(device))
        return gains(device)

    def dequantized(self, weight: Packed) -> Tensor:
        """A packed weight in the dtype that it was quantized from."""
        return dequantize_4bit(weight.codes, weight.state)

    def as_wanted(self, model: Any, name: str, tensor: Tensor) -> Tensor:
        """A tensor that is not packed in the dtype that transformers would read it in, were there no quantizer."""
        wanted: Tensor = model.get_parameter_or_buffer(name)
        if not (tensor.is_floating_point() and wanted.is_floating_point()):
            return tensor
        if self._dtypes is None:
            found = model._get_dtype_plan(model.dtype)  # what the model keeps in float32
            self._dtypes = [(build_glob_alternation([pattern])[0], dtype) for pattern, dtype in found.items()]
        return tensor.to(next((dtype for kept, dtype in self._dtypes if kept.search(name)), wanted.dtype))

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
        self._keep_conversions(model, _once(originals[id(each)] for each in used if id(each) in originals))
        self._returned[:] = _once(
            originals.get(id(each), each)
            for each in self._returned
            if id(each) in originals or not isinstance(each, WeightConverter)
        )
        self._places, self._originals, self._returned = {}, {}, []
        finish(model, self.quantization_config)
        self._parallel.carry_out(model)
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

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """The model in 16 bit again; `dtype` None: its own."""
        dequantize_model(model, model.config.dtype if dtype is None else dtype)
        detach(model)  # also one of which nothing was 4-bit
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


def detach(model: Any) -> None:
    """`attach`'s counterpart, and that of loading: the model is in 16 bit, and transformers is to know it."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, FourbitQuantizer):
        quantizer.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        model._weight_conversions = quantizer._conversions
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
    model.__dict__.pop(K_BIT, None)


def finish(model: Any, config: FourbitConfig) -> None:
    """What any 4-bit model of transformers gets, however it came to be."""
    setattr(model, K_BIT, True)
    use_fourbit_experts(model)
    if config.offload_experts:
        from fourbit_transformers.expert_offload import offload_experts  # which imports torch's compiler

        offload_experts(model, model.device)


def _require_files_of_ours(files: list[str]) -> None:
    """Raise ValueError for what `save_pretrained` writes of a model of which only a part was quantized in memory.

    The outer model knows of no quantizer then, and its files have the modules' own storage.
    """
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as opened:
            name = next((name for name in opened.keys() if name.endswith(".qweight")), None)  # noqa: SIM118
        if name is not None:
            raise ValueError(
                f"{file} has {name!r}, a 4-bit module's own storage: it was written by save_pretrained of a model of"
                " which a part alone had been quantized in memory. Quantize the whole, quantize_model(model), with"
                " skip_modules for what is to stay, and save it again"
            )


def _once(items: Iterable[Any]) -> list[Any]:
    """Without those that were there already: of one converter several may have been made."""
    return list({id(each): each for each in items}.values())
