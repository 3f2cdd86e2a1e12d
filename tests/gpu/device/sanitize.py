"""Every kind of kernel once, small and ragged, for compute-sanitizer; the command is in fourbit_cuda/README.md."""

from __future__ import annotations

import torch

import fourbit

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def elementwise(dtype: torch.dtype) -> None:
    """quantize, dequantize and their 8-bit forms at odd addresses, embedding."""
    for count in (4096 * 5 + 33, 64 * 33, 7):
        for blocksize in (32, 64, 1024, 4096):
            w = torch.randn(count, device="cuda").to(dtype)[1:]
            packed, state = fourbit.quantize_4bit(w, blocksize=blocksize, double_quant=blocksize == 64)
            fourbit.dequantize_4bit(packed, state)
            codes, absmax = fourbit.quantize_blockwise(w)
            fourbit.dequantize_blockwise(codes, absmax, dtype=dtype)
    for dim in (64, 77):
        w = torch.randn(50, dim, device="cuda").to(dtype)
        packed, state = fourbit.quantize_4bit(w, quant_type="fp4", double_quant=dim == 64)
        fourbit.embedding_4bit(torch.arange(49, -1, -1, device="cuda"), packed, state, dtype)


def products(dtype: torch.dtype) -> None:
    """linear and its gradient for few and many rows, experts; rows of whole blocks, and blocks that run across rows."""
    for n, k in ((256, 512), (129, 200)):
        for double_quant in (False, True):
            w = torch.randn(n, k, device="cuda").to(dtype)
            packed, state = fourbit.quantize_4bit(w, double_quant=double_quant)
            for rows in (1, 3, 16, 40, 64, 150, 300):
                x = torch.randn(rows, k, device="cuda").to(dtype).requires_grad_()
                bias = torch.randn(n, device="cuda").to(dtype)
                fourbit.linear_4bit(x, packed, state, bias).sum().backward()
    experts = torch.randn(4, 128, 256, device="cuda").to(dtype)
    packed, state = fourbit.quantize_4bit(experts)
    for ends in ([2, 2, 7, 9], [150, 150, 300, 420]):
        x = torch.randn(ends[-1] + 1, 256, device="cuda").to(dtype).requires_grad_()
        fourbit.grouped_linear_4bit(x, torch.tensor(ends, device="cuda"), packed, state).sum().backward()


def main() -> None:
    """All of it."""
    for dtype in DTYPES:
        elementwise(dtype)
        products(dtype)
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
