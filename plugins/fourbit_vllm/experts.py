"""The experts of vLLM's mixtures in 4 bits: all experts of a projection in one product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from fourbit.nn.routing import by_expert
from fourbit_vllm.packed import Piece, join
from fourbit_vllm.parameter import Loading, Rules

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

_NAMES = ("w13", "w2")
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class FourbitExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """`w13_qweight`, `w13_absmax`, `w13_code` (gate above up) and likewise `w2_…` in the place of the weights."""

    def __init__(self, config: Rules, prefix: str, moe: Any) -> None:
        super().__init__(moe)
        self.config, self.prefix = config, prefix
        self.blocksizes: dict[str, int] = {}
        if moe.has_bias:
            raise ValueError(f"{prefix}: fourbit's vLLM plugin has no experts with biases")

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Parameters that gather what is loaded."""
        halves = 2 if self.moe.is_act_and_mul else 1
        shapes = {
            "w13": (num_experts, halves * intermediate_size_per_partition, hidden_size),
            "w2": (num_experts, hidden_size, intermediate_size_per_partition),
        }
        rank = self.moe.moe_parallel_config.tp_rank
        for name, shape in shapes.items():
            weight = nn.Parameter(torch.empty(shape, dtype=params_dtype, device="meta"), requires_grad=False)
            loader = _Loader(
                layer, Loading(self.config, self.prefix, params_dtype), rank, intermediate_size_per_partition
            )
            weight.weight_loader = loader  # type: ignore[attr-defined]
            layer.register_parameter(f"{name}_weight", weight)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """The gathered parts become what `apply` takes."""
        gathered = {}
        for name in _NAMES:
            weight = getattr(layer, f"{name}_weight")
            loading: Loading = weight.weight_loader.loading
            count, rows, width = weight.shape
            parts = loading.all_parts(f"{self.prefix}.{name}", count * rows, width)
            gathered[name] = parts, tuple(weight.shape)
        packed = {isinstance(part, Piece) for parts, _ in gathered.values() for part in parts}
        if packed == {False}:
            self._stay(layer, gathered)
            return
        for name, (parts, _) in gathered.items():
            whole = join([part for part in parts if isinstance(part, Piece)]) if packed == {True} else None
            if whole is None:
                raise ValueError(
                    f"{self.prefix}: its experts are not all in 4 bits with one code table, in blocks that this rank's"
                    " part of them is made of; vLLM can serve them with fewer ranks, or with expert parallelism"
                )
            delattr(layer, f"{name}_weight")
            for what, tensor in (("qweight", whole.codes), ("absmax", whole.scales), ("code", whole.code)):
                layer.register_parameter(f"{name}_{what}", nn.Parameter(tensor, requires_grad=False))
            self.blocksizes[name] = whole.blocksize

    def _stay(self, layer: RoutedExperts, gathered: dict[str, Any]) -> None:
        """Experts of which nothing is in 4 bits are vLLM's own."""
        for name, (parts, shape) in gathered.items():
            weight = nn.Parameter(torch.cat(parts).view(shape), requires_grad=False)
            layer.register_parameter(f"{name}_weight", weight)
        method = UnquantizedFusedMoEMethod(self.moe)
        layer._replace_quant_method(method)
        method.process_weights_after_loading(layer)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        """Of vLLM's own kernels, which have no part in this."""
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """x [T, hidden] to the weighted sum of its experts'; topk_weights and topk_ids are [T, k].

        An expert of another rank, under expert parallelism, adds nothing. Nothing depends on values on the host.
        """
        k, count = topk_ids.shape[1], layer.local_num_experts
        ids = topk_ids.long()
        if layer.expert_map is not None:
            ids = layer.expert_map[ids].long()
            ids = torch.where(ids < 0, count, ids)
        routed = by_expert(ids, count)
        _, order, offsets = routed
        rows = x[order // k]
        weights = topk_weights.reshape(-1)[order].unsqueeze(-1)
        if layer.apply_router_weight_on_input:
            rows = rows * weights.to(rows.dtype)
        inner = layer.intermediate_size_per_partition
        h = self._product(layer, "w13", rows, offsets, inner * (2 if self.moe.is_act_and_mul else 1))
        gated = torch.empty(len(h), inner, dtype=h.dtype, device=h.device)
        config = ApplyMoEActivationConfig(
            clamp_limit=layer.swiglu_limit,
            alpha=1.0 if layer.swiglu_alpha is None else layer.swiglu_alpha,
            beta=layer.swiglu_beta or 0.0,
        )
        gated = apply_moe_activation(layer.activation, gated, h, activation_config=config)
        y = self._product(layer, "w2", gated, offsets, layer.hidden_size)
        # rows of other ranks' experts are zeros: their products are
        y = y if layer.apply_router_weight_on_input else y * weights
        return routed.summed(y, k).to(x.dtype)

    def _product(self, layer: RoutedExperts, name: str, x: Tensor, offsets: Tensor, out: int) -> Tensor:
        weight = tuple(getattr(layer, f"{name}_{what}") for what in ("qweight", "absmax", "code"))
        y: Tensor = torch.ops.fourbit.grouped_linear_4bit(x, offsets, *weight, self.blocksizes[name], out)
        return y


class _Loader:
    """The `weight_loader` of a parameter of experts: one expert's matrix at a time, of this rank's or not."""

    supports_moe_loading = True

    def __init__(self, layer: RoutedExperts, loading: Loading, rank: int, inner: int) -> None:
        self.layer, self.loading, self.rank, self.inner = layer, loading, rank, inner

    def __call__(
        self,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Whether the expert is this rank's, if that is asked for."""
        local = self.layer._map_global_expert_id_to_local_expert_id(expert_id)
        if local >= 0:
            name = f"{self.loading.prefix}.{expert_id}.{_PROJECTIONS[shard_id]}"
            hidden = self.layer.hidden_size
            if shard_id == "w2":
                self.loading.take((local, 0), loaded_weight, (hidden, self.inner), name, column=self.rank * self.inner)
            else:
                half = 1 if shard_id == "w3" else 0
                shape = (self.inner, hidden)
                self.loading.take((local, half), loaded_weight, shape, name, row=self.rank * self.inner)
        return local >= 0 if return_success else None
