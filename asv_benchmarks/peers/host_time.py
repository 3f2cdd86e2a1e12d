"""Prints what fourbit adds to a call and to an import, in one process, beside torch and bitsandbytes.

    python asv_benchmarks/overhead.py

Every row is a median of interleaved rounds, so the differences hold also on a busy machine.
"""

from __future__ import annotations

import platform
from statistics import median

import torch
from benchmarks.measure import import_milliseconds, microseconds
from benchmarks.null_backend import null_backend

import fourbit

SIZE = 64


def bitsandbytes_call(plain: torch.nn.Linear, x: torch.Tensor):
    """A call of bitsandbytes' Linear4bit on the CPU, or None if it is not installed."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return None
    module = bnb.nn.Linear4bit(SIZE, SIZE, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    module.weight = bnb.nn.Params4bit(plain.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    module = module.to("cpu")  # left in training mode: its evaluation mode packs the weight anew, for good
    return lambda: module(x)


def calls(backend) -> dict:
    """What is measured, by name. The kernels of the first five do nothing."""
    plain = torch.nn.Linear(SIZE, SIZE, bias=False)
    x = torch.randn(1, SIZE)
    packed, state = fourbit.quantize_4bit(plain.weight.detach(), blocksize=64)
    module = fourbit.nn.Linear4bit.from_linear(plain, fourbit.QuantConfig(blocksize=64))
    with_bias = torch.nn.Linear(SIZE, SIZE).requires_grad_(False)
    module_bias = fourbit.nn.Linear4bit.from_linear(with_bias, fourbit.QuantConfig(blocksize=64))
    module_nested = fourbit.nn.Linear4bit.from_linear(plain, fourbit.QuantConfig(blocksize=64, double_quant=True))
    arguments = (x, packed, state.absmax, state.code, 64, SIZE, None, None, None, None)
    return {
        "backend method, called directly": lambda: backend.linear_4bit(*arguments),
        "fourbit.linear_4bit": lambda: fourbit.linear_4bit(x, packed, state),
        "Linear4bit.__call__": lambda: module(x),
        "Linear4bit.__call__, bias": lambda: module_bias(x),
        "Linear4bit.__call__, double_quant": lambda: module_nested(x),
        "torch nn.Linear, its kernel included": lambda: plain(x),
        "bitsandbytes Linear4bit, its kernel included": bitsandbytes_call(plain, x),
    }


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with null_backend(torch.zeros(1, SIZE)) as backend:
        times = microseconds({name: call for name, call in calls(backend).items() if call is not None})
    base = next(iter(times.values()))
    print(f"Python {platform.python_version()}, torch {torch.__version__}, fourbit {fourbit.__version__}\n")
    print(f"{'µs a call, x [1, 64], weight [64, 64]':48s} {'median':>7s} {'over the method':>16s}")
    for name, value in times.items():
        print(f"{name:48s} {value:7.2f} {value - base:16.2f}")
    imports = import_milliseconds()
    print(f"\nimport fourbit after import torch: median {median(imports):.1f} ms, least {imports[0]:.1f} ms")


if __name__ == "__main__":
    main()
