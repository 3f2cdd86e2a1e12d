"""PackedStorage: how a module holds its 4-bit weight. Plain integer parameters, and a `.weight` view.

Everything that must keep its bits is an integer tensor: `qweight` uint8, and float32 scales as int32 bit
patterns. Casts (`.half()`), mixed precision and serialization then have nothing to round, and rows shard on
dimension 0. They are FrozenTensors: nobody's arithmetic on `parameters()` reaches them. `weight` is a throw-away
`WeightView` of the logical shape and dtype, so that libraries which read or write `module.weight` (peft's merges,
initializations) work without knowing of fourbit.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fourbit import checks, codebooks, dispatch
from fourbit.functional import dequantize_4bit, quantize_4bit, require_finite
from fourbit.nn import integer_shards
from fourbit.nn.frozen import FrozenCodes, FrozenScales, FrozenTensor, frozen, plain
from fourbit.nn.loading import entry_errors
from fourbit.nn.view import WeightView
from fourbit.scales import NESTED_BLOCKSIZE
from fourbit.state import QuantState
from fourbit.weight import Weight

if TYPE_CHECKING:
    from fourbit.nn.parallel import Split

_float32 = torch.float32
_new = tuple.__new__
_plain = torch._C.DisableTorchFunctionSubclass
_modes = torch._C._len_torch_dispatch_stack
_compiling = torch.compiler.is_compiling
_FLOAT32_NAN = 0x7FC00000
_NESTED_BUFFERS = ("nested_scales", "nested_codebook", "nested_offset")
STORAGE = ("qweight", "scales", "codebook", *_NESTED_BUFFERS)
"""Names of the parameters and buffers that make up the weight; the last three where it is double-quantized."""


class PackedStorage(nn.Module):
    """A module with a 4-bit weight of `weight_shape`, n elements in b = ceil(n/blocksize) blocks.

    Attributes:
        qweight: Parameter uint8 [*weight_shape[:-1], weight_shape[-1]/2], or flat [ceil(n/2)] if the last
            dimension is odd.
        scales: Parameter int32 holding float32 bits, or uint8 if double-quantized: [*weight_shape[:-1],
            weight_shape[-1]/blocksize], or flat [b] where blocks run across rows.
        codebook: buffer int32 [16] holding float32 bits; if double-quantized likewise
        nested_scales [ceil(b/256)], nested_codebook [256] and nested_offset [1].
        quant_type, blocksize, double_quant: as in QuantConfig.
        dtype: logical dtype of `weight`; follows `.half()` and the like, which leave the bits alone.
        weight_shape: torch.Size of `weight`.
        split: how `parallelize_module` has distributed the storage, see `fourbit.nn.parallel`; None: not at all.
        rewrites: how often `weight` was written to since the weight was stored or loaded, each time rounded anew.

    Until a weight is stored or loaded the scales are NaN: what was never set computes NaN, not garbage.

    What `state_dict()` holds aliases the storage and is guarded like it (see FrozenTensor). An average of such state
    dicts, made by hand, has float32 in place of the integers: `load_state_dict` refuses it, and takes one in which
    only the floating-point entries were averaged. FSDP2's shards are DTensors of ordinary integers: there whoever
    averages must leave out what requires no gradient.
    """

    _is_hf_initialized = True  # transformers' initialization must not overwrite packed weights
    qweight: Tensor
    scales: Tensor
    codebook: Tensor
    rewrites: int = 0
    split: Split | None = None

    def setup(
        self,
        shape: tuple[int, ...],
        quant_type: str,
        blocksize: int | None,
        double_quant: bool,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        """Register the empty storage. To be called once, after nn.Module.__init__."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        op = type(self).__name__
        checks.compute_dtype(op, dtype)
        where = torch.device("cpu" if device is None else device) if device is not None else torch.empty(0).device
        if blocksize is None:
            blocksize = dispatch.default_blocksize(where if where.type != "meta" else torch.device("cpu"))
        checks.blocksize(op, blocksize)
        if not shape or prod(shape) < 1:
            raise ValueError(f"{op}: a weight of shape {list(shape)} has no elements")
        self.quant_type = codebooks.get(quant_type).name
        self.blocksize = blocksize
        self.double_quant = double_quant
        self.dtype = dtype
        self.weight_shape = torch.Size(shape)
        packed_shape, scales_shape = self._storage_shapes()
        qweight = torch.zeros(packed_shape, dtype=torch.uint8, device=where)
        self.qweight = FrozenTensor(qweight)
        blocks = prod(scales_shape)
        if double_quant:
            scales = torch.zeros(scales_shape, dtype=torch.uint8, device=where)
            groups = -(-blocks // NESTED_BLOCKSIZE)
            nested = torch.full((groups,), _FLOAT32_NAN, dtype=torch.int32, device=where)
            self.register_buffer("nested_scales", nested)
            self.register_buffer("nested_codebook", _bits(codebooks.dynamic_map()).to(where, copy=True))
            self.register_buffer("nested_offset", torch.zeros(1, dtype=torch.int32, device=where))
        else:
            scales = torch.full(scales_shape, _FLOAT32_NAN, dtype=torch.int32, device=where)
        self.scales = FrozenTensor(scales)
        self.register_buffer("codebook", _bits(codebooks.get(quant_type).tensor()).to(where, copy=True))
        self._freeze()

    def _storage_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        *lead, last = self.weight_shape
        count = prod(self.weight_shape)
        packed = (*lead, last // 2) if last % 2 == 0 else ((count + 1) // 2,)
        scales = (*lead, last // self.blocksize) if last % self.blocksize == 0 else (-(-count // self.blocksize),)
        return packed, scales

    def _freeze(self) -> None:
        """Make FrozenTensors of the storage where it has been replaced by ordinary tensors; say what they count for."""
        tables: tuple[dict[str, Any], dict[str, Any]] = (self._parameters, self._buffers)
        for tensors in tables:
            for name in STORAGE:
                if type(tensors.get(name)) in (Tensor, nn.Parameter):
                    tensors[name] = frozen(tensors[name], parameter=tensors is self._parameters)
        codes, scales = self._parameters.get("qweight"), self._parameters.get("scales")
        if isinstance(codes, FrozenTensor):
            codes.__class__, codes.count = FrozenCodes, self.weight_shape.numel()
        if isinstance(scales, FrozenTensor):
            scales.__class__ = FrozenScales

    # ---- reading and writing the weight ------------------------------------------------------------

    def packed_weight(self) -> Weight:
        """The weight as the ops take it, sharing the module's storage; gathered where that is distributed."""
        if self.split is not None:
            gathered: Weight = parallel().whole(self)
            return gathered
        # straight from the dicts: nn.Module's attribute look-up costs as much as all the rest
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        qweight, scales, code = parameters["qweight"], parameters["scales"], buffers["codebook"]
        if not _compiling() and _modes():  # a dispatch mode may know ordinary tensors alone
            qweight, scales, code = plain(qweight), plain(scales), plain(code)
            buffers = {name: plain(tensor) for name, tensor in buffers.items()}
        with _plain():
            packed, code, blocksize = qweight.detach(), code.view(_float32), self.blocksize
            if not self.double_quant:
                return _new(Weight, (packed, scales.view(_float32), code, blocksize, None, None, None))
            a, b, c = (buffers[name].view(_float32) for name in _NESTED_BUFFERS)
            return _new(Weight, (packed, scales.detach(), code, blocksize, a, b, c))

    def quant_state(self) -> tuple[Tensor, QuantState]:
        """`(packed, state)`, sharing the module's storage."""
        packed, absmax, code, blocksize, *nested = self.packed_weight()
        shape, kind = self.weight_shape, self.quant_type
        return packed, QuantState(absmax.reshape(-1), shape, code, blocksize, kind, self.dtype, *nested)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as an ordinary tensor of `weight_shape`, in `dtype` (None: the logical one)."""
        packed, state = self.quant_state()
        return dequantize_4bit(packed, state, dtype)

    @torch.no_grad()
    def store(self, w: Tensor, name: str = "weight") -> None:
        """Quantize `w` (of `weight_shape`) into the storage, in place.

        Raises ValueError for another shape and NonFiniteError, with `name`, for NaN or Inf.
        """
        self.load_packed(*self.encoded(w.detach().to(self.qweight.device), name))

    @torch.no_grad()
    def encoded(self, w: Tensor, name: str = "weight") -> tuple[Tensor, QuantState]:
        """`w` as this module would hold it, `(packed, state)`, on the device of `w`; raises as `store` does."""
        if w.shape != self.weight_shape:
            raise ValueError(f"{name}: want shape {list(self.weight_shape)}, got {list(w.shape)}")
        packed, state = quantize_4bit(
            w.detach(), quant_type=self.quant_type, blocksize=self.blocksize, double_quant=self.double_quant
        )
        if bool(state.scales().isnan().any()):  # of a block with NaN or Inf; to look at each weight costs far more
            require_finite(w, name)
        return packed, state

    @torch.no_grad()
    def load_packed(self, packed: Tensor, state: QuantState) -> None:
        """Take over an already quantized weight, copying it into the storage.

        Raises ValueError if its shape, type, blocksize or double quantization is not the module's.
        """
        for name, tensor in self.storage_of(packed, state).items():
            own = getattr(self, name)
            own.copy_(tensor) if self.split is None else parallel().copy_into(own, tensor)
        self._forget()
        self.rewrites = 0

    def storage_of(self, packed: Tensor, state: QuantState) -> dict[str, Tensor]:
        """A packed weight as tensors of this module's storage, by name, without a copy where none is needed.

        Raises ValueError if its shape, type, blocksize or double quantization is not the module's.
        """
        mine = (self.weight_shape, self.quant_type, self.blocksize, self.double_quant)
        its = (state.shape, state.quant_type, state.blocksize, state.double_quant)
        if mine != its:
            raise ValueError(
                f"{type(self).__name__} holds (shape, quant_type, blocksize, double_quant) = {_words(mine)},"
                f" the packed weight is {_words(its)}"
            )
        if packed.dtype != torch.uint8 or packed.nelement() != self.qweight.nelement():
            count = self.qweight.nelement()
            raise ValueError(f"packed: want uint8 with {count} bytes, got {packed.dtype} {packed.shape}")
        absmax = state.absmax if state.double_quant else _bits(state.absmax)
        tensors = {
            "qweight": packed.reshape(self.qweight.shape),
            "scales": absmax.reshape(self.scales.shape),
            "codebook": _bits(state.code).clone(),  # states of one data type share theirs
        }
        if state.nested_absmax is not None:
            assert state.nested_code is not None and state.nested_offset is not None
            tensors["nested_scales"] = _bits(state.nested_absmax)
            tensors["nested_codebook"] = _bits(state.nested_code).clone()
            tensors["nested_offset"] = _bits(state.nested_offset.reshape(1))
        return tensors

    @property
    def weight(self) -> WeightView:
        """A throw-away tensor of the logical shape and dtype: reading dequantizes, writing requantizes."""
        return WeightView(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            if not isinstance(value, Tensor):
                raise TypeError(f"weight must be a tensor, got {type(value).__name__}")
            if isinstance(value, WeightView) and value.holder is self:
                return  # what `module.weight += x` assigns after it has been written
            self.store(value)
            return
        if "_is_replica" in self.__dict__ and isinstance(value, Tensor) and name not in self._buffers:
            # nn.DataParallel's: its copies of parameters are attributes, which is not where anything looks for them
            self._parameters[name] = frozen(value, parameter=False) if name in STORAGE else value  # type: ignore[assignment]
            return
        if name in STORAGE and type(value) in (Tensor, nn.Parameter):  # also what load_state_dict(assign=True) assigns
            value = frozen(value, parameter=isinstance(value, nn.Parameter))
        if name in STORAGE and isinstance(value, nn.Parameter) and name in self._parameters:
            self._parameters[name] = value  # not by register_parameter: FSDP2 sets its shards so
        else:
            super().__setattr__(name, value)
        if name in STORAGE:
            self._freeze()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's. A DTensor for `weight`, or in the place of the storage, distributes it: see `split`."""
        if hasattr(param, "device_mesh") and (name == "weight" or name in STORAGE):
            parallel().register(self, name, param)
        else:
            super().register_parameter(name, param)

    if integer_shards.NEEDED:

        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            """As nn.Module's: what FSDP2 and parallel styles ask for first."""
            integer_shards.allow()
            return super().named_parameters(*args, **kwargs)

    def _forget(self) -> None:
        """Have what is derived of a distributed weight made anew: writing through a DTensor leaves no trace on it."""
        if self.split is not None:
            self.split.weight = None

    def parallel_shape(self) -> tuple[int, int]:
        """The rows and columns by which tensor parallelism may divide the weight. NotImplementedError: it may not."""
        raise NotImplementedError(f"{type(self).__name__} cannot be divided over processes; leave it out of the plan")

    def _set_dtype(self, dtype: torch.dtype) -> None:
        if dtype in checks.COMPUTE_DTYPES:
            self.dtype = dtype

    # ---- what nn.Module does to tensors ----------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        own = {id(t) for t in (*self._parameters.values(), *self._buffers.values()) if _is_storage(t)}

        def keep_bits(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) in own and result.dtype != tensor.dtype:  # nn.Module.type() casts integers too
                return tensor.to(result.device)
            return result

        # what does `fn` do to a floating-point weight? Then that is the logical dtype from here on.
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.qweight.device))
        result = super()._apply(keep_bits, recurse)  # type: ignore[no-untyped-call]
        self._freeze()
        self._set_dtype(probe.dtype)
        return result

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """All of the module or nothing of it: everything is looked through before anything is taken.

        A bias may be absent (whether that is an error torch decides when all modules are done, and `strict` here is
        always true), but no part of the weight: half a weight would compute garbage.
        """
        own = {
            name: tensor
            for tensors in (self._parameters, self._buffers)
            for name, tensor in tensors.items()
            if tensor is not None and name not in self._non_persistent_buffers_set
        }
        table = _bits(codebooks.get(self.quant_type).tensor())
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        errors = entry_errors(
            own, [name for name in STORAGE if name in own], table, self.quant_type, state_dict, prefix, assign
        )
        if errors:
            error_msgs += errors
            # torch's own look finds the module's tensors as they are, and reports what is missing or unexpected
            unchanged = {prefix + k: v for k, v in own.items() if prefix + k in state_dict}
            state_dict = {**state_dict, **unchanged}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._freeze()
        self.rewrites = 0
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._freeze()

    def extra_repr(self) -> str:
        """The shape and the quantization, for repr()."""
        shape = "×".join(map(str, self.weight_shape))
        nested = ", double_quant" if self.double_quant else ""
        return f"{shape}, {self.quant_type}, blocksize={self.blocksize}{nested}"


def parallel() -> Any:
    """`fourbit.nn.parallel`, imported with the first distributed layer: torch.distributed.tensor takes its time."""
    from fourbit.nn import parallel

    return parallel


def _is_storage(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype in (torch.uint8, torch.int32)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32)


def _words(facts: tuple[Any, ...]) -> str:
    shape, *rest = facts
    return f"({list(shape)}, {', '.join(map(str, rest))})"
