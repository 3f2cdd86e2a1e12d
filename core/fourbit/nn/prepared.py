"""The Weight of a layer, kept from one product to the next: to make it anew takes half as long as torch's linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourbit.direct import plain, vouch
from fourbit.nn.frozen import FrozenCodes
from fourbit.nn.storage import STORAGE, PackedStorage
from fourbit.weight import Weight

_plain = torch._C.DisableTorchFunctionSubclass
_A, _B, _C = STORAGE[3:]

Prepared = tuple[Weight, torch.Size, tuple[Tensor, ...], tuple[int, ...]]
"""A Weight, and what it was made of: shape, parts but the codes, with which it is kept, and addresses of all."""


def prepared(layer: PackedStorage) -> Weight | None:
    """What `layer.packed_weight()` gives, and vouched for; None where that is not to be kept, or is not right.

    To be asked for only where nothing is going on that torch's dispatcher serves (see `fourbit.direct`). It is kept
    with the parameter `qweight`, so that it goes when the weight does, and as long as each part is the same tensor,
    with its memory at the same address.
    """
    parameters, buffers = layer._parameters, layer._buffers
    codes: Any = parameters["qweight"]
    kept: Prepared | None = getattr(codes, "prepared", None)
    if kept is None:
        return _prepare(layer, codes)
    weight, shape, parts, addresses = kept
    scales: Any = parameters["scales"]
    table: Any = buffers["codebook"]
    if shape is layer.weight_shape and scales is parts[0] and table is parts[1]:
        with _plain():  # or each of them would take a microsecond to say where it is
            if weight[4] is None:
                if (codes.data_ptr(), scales.data_ptr(), table.data_ptr()) == addresses:
                    return weight
            else:
                _, _, a, b, c = parts
                if buffers.get(_A) is a and buffers.get(_B) is b and buffers.get(_C) is c:
                    at = codes.data_ptr(), scales.data_ptr(), table.data_ptr(), a.data_ptr(), b.data_ptr(), c.data_ptr()
                    if at == addresses:
                        return weight
    return _prepare(layer, codes)


def _prepare(layer: PackedStorage, codes: Any) -> Weight | None:
    # FSDP's shards, an argument of functional_call; a layer whose weight comes from elsewhere
    if type(codes) is not FrozenCodes or type(layer).packed_weight is not PackedStorage.packed_weight:
        return None
    tables: dict[str, Any] = {**layer._parameters, **layer._buffers}
    parts = tuple(tables[name] for name in (STORAGE[1:] if layer.double_quant else STORAGE[1:3]))
    with _plain(), torch.inference_mode(False):  # views that are made in inference mode could not be saved for backward
        weight = layer.packed_weight()
        addresses = tuple(part.data_ptr() for part in (codes, *parts))
    try:
        right = weight.checked("prepared", layer.weight_shape.numel(), weight.packed.device) is weight  # not a copy
    except ValueError:
        return None  # the op says what is wrong
    if not right or not all(plain(part) for part in weight if isinstance(part, Tensor)):
        return None
    vouch(weight)
    codes.prepared = weight, layer.weight_shape, parts, addresses
    return weight
