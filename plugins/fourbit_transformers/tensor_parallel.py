"""`from_pretrained(…, tp_plan="auto")`: transformers' plan, carried out on 4-bit layers by torch's parallel styles.

transformers shards tensors as it reads them, which a 4-bit weight's blocks, and the mean of all its scales, do not
allow. So the plan's entries for such weights become ones of a style that does nothing; each process reads and quantizes
the whole weight, one at a time, and when all are there each keeps its part. What is not 4-bit stays with transformers.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.nn import ExpertWeights4bit, PackedModule

WHOLE = "fourbit_whole"
"""The name of the style that does nothing."""

_COLUMNS = {"colwise": False, "colwise_gather_output": True, "colwise_rep": True}
"""Styles that divide a layer's rows, and whether its result is gathered."""

_ROWS = {"rowwise": False, "rowwise_split_input": True, "rowwise_rep": True}
"""Styles that divide its columns, and whether its input comes whole."""

_NOTHING = {"replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj"}
"""Styles under which a layer with a frozen weight is whole on each process."""

_EXPERTS = {"packed_colwise", "packed_rowwise", "grouped_gemm", *_COLUMNS, *_ROWS}
"""Styles of stacked weights: any means that each process has some of the experts."""


def styles() -> Any:
    """transformers' table of styles, with ours; None without torch.distributed, or in a version without one."""
    if not torch.distributed.is_available():
        return None
    from transformers.integrations import tensor_parallel

    found: Any = tensor_parallel.ALL_PARALLEL_STYLES
    if WHOLE not in found:
        base: Any = tensor_parallel.TensorParallelLayer

        class Whole(base):  # type: ignore[misc]
            """Does nothing: neither when tensors are read nor in a forward."""

            def shard_tensor(self, param: Any, tensor_idx: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
                whole: Tensor = param[...].to(device=device, dtype=dtype)
                return whole

            def prepare_module_tp(self, module: nn.Module, *_: Any, **__: Any) -> nn.Module:
                return module

            def install_forward(self, module: nn.Module, *_: Any) -> nn.Module:
                return module

        found.register(WHOLE, Whole())
        for table in ("plan_to_weight_dim", "plan_to_bias_dim"):
            if hasattr(found, table):
                getattr(found, table)[WHOLE] = None
    return found


class Plan:
    """The plan's entries for 4-bit weights, from before a model is read until it is divided."""

    def __init__(self) -> None:
        self._entries: dict[str, str] = {}

    def take(self, model: Any, names: list[str]) -> None:
        """Take what the model's plan says of the parameters `names`, and of the modules that they are in."""
        plan = getattr(model, "tp_plan", None)
        if not plan or not _many() or styles() is None:
            return
        for name in names:
            owner, leaf = _key(name.rpartition(".")[0]), name.rpartition(".")[2]
            # of stacked weights all that is beside them: what is left in 16 bit is divided by our implementation
            beside = {key for key in plan if key.startswith(f"{owner}.")} if leaf != "weight" else set()
            for key in beside | {owner, _key(name)}:
                if plan.get(key, WHOLE) != WHOLE:
                    self._entries[key] = plan[key]
        plan.update(dict.fromkeys(self._entries, WHOLE))

    def require_whole(self, model: Any, name: str) -> None:
        """Raise NotImplementedError for a weight that transformers has divided: by a later plan, or experts."""
        held = model.get_parameter_or_buffer(name)
        plan = getattr(model, "tp_plan", None) or {}
        said = {plan.get(_key(each), WHOLE) for each in (name, name.rpartition(".")[0])} - {WHOLE}
        if hasattr(held, "device_mesh") or (said and _size(model) > 1):
            raise NotImplementedError(
                f'{name}: fourbit carries out the model\'s own plan, tp_plan="auto", on 4-bit weights, no other one and'
                " no expert parallelism; name the module in skip_modules to leave it to transformers in 16 bit"
            )

    def carry_out(self, model: Any) -> None:
        """Divide the model's 4-bit layers; nothing where transformers has not been asked to divide the model.

        The plan of a divided model keeps our style for them: what is saved is whole already, and not to be gathered.
        """
        mesh = getattr(model, "_device_mesh", None)
        if self._entries and mesh is not None and _size(model) > 1:
            mesh = mesh if mesh.ndim == 1 else mesh["tp"]
            for name, module in list(model.named_modules()):
                style = self._entries.get(_key(name))
                if style is not None and isinstance(module, PackedModule):
                    divide(name, module, style, mesh)
        elif self._entries:
            model.tp_plan.update(self._entries)
        self._entries = {}


def divide(name: str, module: PackedModule, style: str, mesh: Any) -> None:
    """Have each process of `mesh` keep its part of a 4-bit layer that all have whole, by transformers' style.

    What goes into a layer and comes out are ordinary tensors, each process's part where the style says so.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    from fourbit.nn import parallel

    if isinstance(module, ExpertWeights4bit):
        if style not in _EXPERTS:
            raise NotImplementedError(f"{name}: 4-bit experts know no tensor-parallel style {style!r}")
        parallel.divide(module, mesh, 0)
        return
    if style in _NOTHING:
        return
    if style not in (*_COLUMNS, *_ROWS):
        raise NotImplementedError(
            f"{name}: 4-bit layers know no tensor-parallel style {style!r}; name it in skip_modules, or give a tp_plan"
        )
    rows = style in _ROWS
    parallel.divide(module, mesh, int(rows))
    before = Shard(-1) if rows and not _ROWS[style] else Replicate()
    after = Replicate() if rows or _COLUMNS[style] else Shard(-1)

    def enter(layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = inputs
        if isinstance(x, DTensor):
            return inputs
        shape = torch.Size((*x.shape[:-1], layer.in_features))  # parts may be of different sizes
        stride = torch.empty(shape, device="meta").stride()
        return (DTensor.from_local(x, mesh, [before], run_check=False, shape=shape, stride=stride), *rest)

    def leave(layer: Any, inputs: Any, y: Any) -> Tensor:
        local: Tensor = y.redistribute(placements=[after]).to_local()
        return local

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _key(name: str) -> str:
    """A name as plans have it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _size(model: Any) -> int:
    return getattr(model, "_tp_size", None) or 1


def _many() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
