"""The kernel variants that the backend launches: enough of them that every branch of every source is compiled."""

from __future__ import annotations

import torch

from fourbit_gpu import elementwise, pieces
from fourbit_gpu.spec import KernelSpec
from fourbit_rocm import linear
from fourbit_rocm.targets import Target

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def specs(where: Target) -> list[KernelSpec]:
    """Every kernel for `where`, in the dtypes and blocksizes that change its code."""
    found = []
    for dtype in DTYPES:
        for blocksize in (32, 64, 128, 512, 4096):
            found.append(elementwise.quantize_spec(dtype, blocksize, False))
        found.append(elementwise.quantize_spec(dtype, 128, True))
        found += [elementwise.blockwise_spec("quantize_blockwise", dtype, size) for size in (64, 256, 4096)]
        found.append(elementwise.blockwise_spec("dequantize_blockwise", dtype, 256))
        for nested in (False, True):
            found.append(elementwise.dequantize_spec(dtype, nested))
            found.append(elementwise.embedding_spec(dtype, nested, nested))
            found.append(pieces.slice_spec(dtype, nested))
            found += [linear.vector_spec(dtype, nested, m) for m in (1, 2, 4, 8, 16)]
            if where.has_mfma and (dtype == torch.bfloat16 or (dtype == torch.float16 and where.mfma_is_exact_in_half)):
                found.append(linear.mfma_spec(dtype, nested))
    return found
