"""A backend whose ops run in another process, on kernels built as a test wants them."""

from __future__ import annotations

import torch

from fourbit.backend import Backend
from tests.cpu.native.client import Server

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`Dtype` of kernels.h."""


def weight(packed, absmax, code, blocksize, nested_absmax=None, nested_code=None, nested_offset=None):
    """The fields of `Weight` in kernels.h."""
    return packed, absmax, code, blocksize, nested_absmax, nested_code, nested_offset


class NativeServerBackend(Backend):
    """The kernels of `server`, through calls that have nothing in common with those of fourbit_cpu."""

    api_version = 1
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

    def dequantize_4bit(self, packed, absmax, code, blocksize, shape, dtype, *nested):
        count = torch.Size(shape).numel()
        fields = weight(packed, absmax, code, blocksize, *nested)
        _, (out,) = self.server.call("dequantize_4bit", *fields, count, DTYPES[dtype], (dtype, count))
        return out.view(tuple(shape))

    def linear_4bit(
        self,
        x,
        packed,
        absmax,
        code,
        blocksize,
        out_features,
        nested_absmax=None,
        nested_code=None,
        nested_offset=None,
        bias=None,
    ):
        nested = (nested_absmax, nested_code, nested_offset)
        return self._linear("linear_4bit", x, out_features, (packed, absmax, code, blocksize, *nested), bias)

    def linear_4bit_grad(self, grad, packed, absmax, code, blocksize, in_features, *nested):
        return self._linear("linear_4bit_grad", grad, in_features, (packed, absmax, code, blocksize, *nested))

    def _linear(self, op, x, width, fields, *bias):
        inner = x.shape[-1]
        rows = x.numel() // inner
        n, k = (inner, width) if op.endswith("grad") else (width, inner)
        _, (out,) = self.server.call(
            op, x, DTYPES[x.dtype], rows, n, k, *weight(*fields), *bias, (x.dtype, rows * width)
        )
        return out.view(*x.shape[:-1], width)

    def embedding_4bit(self, ids, packed, absmax, code, blocksize, rows, dim, dtype, *nested):
        sizes = ids.element_size(), ids.numel(), rows, dim
        fields = weight(packed, absmax, code, blocksize, *nested)
        output = dtype, ids.numel() * dim
        bad, (out,) = self.server.call("embedding_4bit", ids, *sizes, *fields, DTYPES[dtype], output)
        if bad >= 0:
            raise IndexError(f"embedding_4bit: id at {bad} is out of range for {rows} rows")
        return out.view(*ids.shape, dim)

    def grouped_linear_4bit(self, x, offsets, packed, absmax, code, blocksize, out_features, *nested):
        fields = (packed, absmax, code, blocksize, *nested)
        return self._grouped("grouped_linear_4bit", x, offsets, out_features, fields)

    def grouped_linear_4bit_grad(self, grad, offsets, packed, absmax, code, blocksize, in_features, *nested):
        fields = (packed, absmax, code, blocksize, *nested)
        return self._grouped("grouped_linear_4bit_grad", grad, offsets, in_features, fields)

    def _grouped(self, op, x, offsets, width, fields):
        rows, inner = x.shape
        n, k = (inner, width) if op.endswith("grad") else (width, inner)
        sizes = DTYPES[x.dtype], rows, offsets.long(), offsets.numel(), n, k
        _, (out,) = self.server.call(op, x, *sizes, *weight(*fields), (x.dtype, rows * width))
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
