"""A backend whose ops run in another process, on kernels built as a test wants them."""

from __future__ import annotations

import torch

from fourbit.backend import Backend
from tests.cpu.native.client import Server

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`Dtype` of kernels.h."""


class NativeServerBackend(Backend):
    """The kernels of `server`, through calls that have nothing in common with those of fourbit_cpu."""

    api_version = 2
    name = "native-server"
    device_types = ("cpu",)
    priority = -1  # never used unless asked for

    def __init__(self, server: Server) -> None:
        self.server = server

    def quantize_4bit(self, w, code, blocksize, signed_scale):
        count, dtype = w.numel(), DTYPES[w.dtype]
        outputs = (torch.uint8, (count + 1) // 2), (torch.float32, -(-count // blocksize))
        _, (packed, absmax) = self.server.call(
            "quantize_4bit", w, dtype, count, code, blocksize, *outputs, int(signed_scale)
        )
        return packed.view(-1, 1), absmax

    def dequantize_4bit(self, weight, shape, dtype):
        count = torch.Size(shape).numel()
        _, (out,) = self.server.call("dequantize_4bit", *weight, count, DTYPES[dtype], (dtype, count))
        return out.view(tuple(shape))

    def linear_4bit(self, x, weight, out_features, bias=None):
        return self._linear("linear_4bit", x, out_features, weight, bias)

    def linear_4bit_grad(self, grad, weight, in_features):
        return self._linear("linear_4bit_grad", grad, in_features, weight)

    def _linear(self, op, x, width, weight, *bias):
        inner = x.shape[-1]
        rows = x.numel() // inner
        n, k = (inner, width) if op.endswith("grad") else (width, inner)
        _, (out,) = self.server.call(op, x, DTYPES[x.dtype], rows, n, k, *weight, *bias, (x.dtype, rows * width))
        return out.view(*x.shape[:-1], width)

    def embedding_4bit(self, ids, weight, rows, dim, dtype):
        sizes = ids.element_size(), ids.numel(), rows, dim
        output = dtype, ids.numel() * dim
        bad, (out,) = self.server.call("embedding_4bit", ids, *sizes, *weight, DTYPES[dtype], output)
        if bad >= 0:
            raise IndexError(f"embedding_4bit: id at {bad} is out of range for {rows} rows")
        return out.view(*ids.shape, dim)

    def grouped_linear_4bit(self, x, offsets, weight, out_features):
        return self._grouped("grouped_linear_4bit", x, offsets, out_features, weight)

    def grouped_linear_4bit_grad(self, grad, offsets, weight, in_features):
        return self._grouped("grouped_linear_4bit_grad", grad, offsets, in_features, weight)

    def _grouped(self, op, x, offsets, width, weight):
        rows, inner = x.shape
        n, k = (inner, width) if op.endswith("grad") else (width, inner)
        sizes = DTYPES[x.dtype], rows, offsets.long(), offsets.numel(), n, k
        _, (out,) = self.server.call(op, x, *sizes, *weight, (x.dtype, rows * width))
        return out.view(rows, width)

    def quantize_blockwise(self, x, code, blocksize):
        outputs = (torch.uint8, x.numel()), (torch.float32, -(-x.numel() // blocksize))
        sizes = DTYPES[x.dtype], x.numel(), code, blocksize
        _, (codes, absmax) = self.server.call("quantize_blockwise", x, *sizes, *outputs)
        return codes.view(x.shape), absmax

    def dequantize_blockwise(self, codes, absmax, code, blocksize, dtype):
        sizes = codes.numel(), code, blocksize, DTYPES[dtype], (dtype, codes.numel())
        _, (out,) = self.server.call("dequantize_blockwise", codes, absmax, *sizes)
        return out.view(codes.shape)
