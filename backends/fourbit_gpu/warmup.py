"""warmup: compile and load, before a CUDA graph is captured or a first request comes, what a model will launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def warmup(model: nn.Module, rows: Sequence[int] = (1,), dtype: torch.dtype | None = None) -> int:
    """Run each kind of 4-bit layer in `model` once for each number of rows, on zeros; returns how many runs.

    Kernels are compiled when first used, and none can be loaded while a graph is captured. Layers of one kind
    have one shape, dtype, blocksize and device; `rows` are the batch sizes to come, since kernels are chosen
    by them. `dtype` is that of the activations: None takes each layer's own.
    """
    from fourbit.nn import PackedModule

    done: set[tuple[object, ...]] = set()
    with torch.no_grad():
        for module in (m for m in model.modules() if isinstance(m, PackedModule)):
            for count in rows:
                kind = (type(module), module.weight_shape, module.query(), count)
                if kind not in done:
                    done.add(kind)
                    module(*module.sample(count, dtype))
    return len(done)
