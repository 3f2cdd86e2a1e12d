"""The linear layers of vLLM in 4 bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    ReplicatedLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from fourbit_vllm.packed import Piece, join
from fourbit_vllm.parameter import FourbitParameter, Loading, Rules


class Stored(NamedTuple):
    """Which parameters of a layer hold some of its rows: packed, or a matrix in 16 bit, whose blocksize is 0."""

    suffix: str
    rows: int
    blocksize: int


@register_weight_loader_v2_supported_method
class FourbitLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """`qweight` uint8 [n/2], `absmax` float32 [n/blocksize] and `code` float32 [16] in the place of `weight`.

    The parts of a fused layer become one packed weight, so that it is one product. Where they cannot (one of them is in
    16 bit, or their tables differ) the layer has several, with numbers behind their names.
    """

    def __init__(self, config: Rules, prefix: str) -> None:
        self.config, self.prefix = config, prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """A parameter that gathers what is loaded."""
        rows = sum(output_partition_sizes)
        loader = extra_weight_attrs["weight_loader"]
        if isinstance(layer, ReplicatedLinear) and len(output_partition_sizes) == 1:
            loader = _load_whole
        weight = FourbitParameter(
            data=torch.empty(rows, input_size_per_partition, dtype=params_dtype, device="meta"),
            weight_loader=loader,
            loading=Loading(self.config, self.prefix, params_dtype),
            names=self.config.parts_of(self.prefix),
        )
        layer.register_parameter("weight", weight)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """The gathered parts become what `apply` takes."""
        weight = layer.weight
        if not isinstance(weight, FourbitParameter):
            return  # a layer that two names share
        rows, width = weight.shape
        parts = weight.loading.all_parts(self.prefix, rows, width)
        del layer.weight
        if not any(isinstance(part, Piece) for part in parts):
            self._stay(layer, torch.cat([part for part in parts if isinstance(part, Tensor)]))
            return
        stored = []
        for i, part in enumerate(_joined(parts)):
            suffix = f"_{i}" if i else ""
            if isinstance(part, Piece):
                tensors = {"qweight": part.codes, "absmax": part.scales, "code": part.code}
                stored.append(Stored(suffix, part.rows, part.blocksize))
            else:
                tensors = {"dense": part}
                stored.append(Stored(suffix, part.shape[0], 0))
            for name, tensor in tensors.items():
                layer.register_parameter(name + suffix, nn.Parameter(tensor, requires_grad=False))
        layer.fourbit_stored = tuple(stored)  # type: ignore[assignment]  # an attribute of ours

    def _stay(self, layer: nn.Module, weight: Tensor) -> None:
        """A layer of which nothing is in 4 bits is one of vLLM's own."""
        layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        method = UnquantizedLinearMethod()
        layer.quant_method = method
        method.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] times the transposed weight [out, in]: [..., out]."""
        stored: tuple[Stored, ...] = layer.fourbit_stored  # type: ignore[assignment]
        if len(stored) == 1:
            return _product(layer, x, stored[0], bias)
        y = torch.cat([_product(layer, x, each, None) for each in stored], -1)
        return y if bias is None else y + bias


def _product(layer: nn.Module, x: Tensor, stored: Stored, bias: Tensor | None) -> Tensor:
    suffix, rows, blocksize = stored
    if not blocksize:
        return nn.functional.linear(x, getattr(layer, f"dense{suffix}"), bias)
    weight = tuple(getattr(layer, name + suffix) for name in ("qweight", "absmax", "code"))
    y: Tensor = torch.ops.fourbit.linear_4bit(x, *weight, blocksize, rows, bias=bias)
    return y


def _joined(parts: list[Piece | Tensor]) -> list[Piece | Tensor]:
    """As few parts as it can be in this order."""
    made: list[Piece | Tensor] = []
    for part in parts:
        before = made[-1] if made else None
        if isinstance(part, Tensor) and isinstance(before, Tensor):
            made[-1] = torch.cat([before, part])
            continue
        both = join([before, part]) if isinstance(part, Piece) and isinstance(before, Piece) else None
        if both is None:
            made.append(part)
        else:
            made[-1] = both
    return made


def _load_whole(param: FourbitParameter, loaded_weight: Tensor, *_: Any) -> None:
    param.load_whole(loaded_weight)
