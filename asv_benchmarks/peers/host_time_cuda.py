"""Prints what a call costs the host on a GPU: from Linear4bit.__call__ to the driver's launch, and whole calls, also of
forward and backward.

    python -m peers.host_time_cuda [--size 2048]

Whole calls are those of torch's nn.Linear and of bitsandbytes' Linear4bit too, interleaved. "To the launch" is the
time from the call to the entry of cuLaunchKernelEx, measured by a stand-in for that function: without the driver's
own part. The layers are small, so that the GPU is never waited for; those of 2048 features multiply 64 rows by pieces.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from statistics import median

import torch

import fourbit
from fourbit_cuda.driver import launcher
from harness import bnb
from harness.calls import microseconds
from harness.training import Nothing, table, training_microseconds

TRAINING_ROWS = (1, 64, 2048)
"""Of x: of the kernels for few rows and for many, and of a training step."""


def synchronized(call, layers: int = 1):
    """`call` of so many layers, with the queue drained every 64 of them, so that no call waits for room in it."""
    every = max(64 // layers, 1)
    count = 0

    def run():
        nonlocal count
        count += 1
        if count % every == 0:
            torch.cuda.synchronize()
        return call()

    return run


def to_the_launch(layer: torch.nn.Module, x: torch.Tensor, rounds: int = 4000) -> float:
    """Median microseconds from the call of `layer` to the entry of the driver's launch function."""
    layer(x)
    times: list[int] = []

    def entered(*_: object) -> int:
        times.append(time.perf_counter_ns())
        return 0

    kernels = launcher(torch.cuda.current_device()).loaded()
    kept = [kernel.launch_function for kernel in kernels]
    for kernel in kernels:
        kernel.launch_function = entered
    samples = []
    try:
        for _ in range(rounds):
            times.clear()
            start = time.perf_counter_ns()
            layer(x)
            samples.append((times[-1] - start) / 1e3)
    finally:
        for kernel, function in zip(kernels, kept, strict=True):
            kernel.launch_function = function
    return median(samples)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="features of the layers, in and out")
    size = parser.parse_args().size
    torch.manual_seed(0)
    plain = torch.nn.Linear(size, size, bias=False, dtype=torch.bfloat16, device="cuda").requires_grad_(False)
    layer = fourbit.nn.Linear4bit.from_linear(plain)
    double = fourbit.nn.Linear4bit.from_linear(plain, fourbit.QuantConfig(double_quant=True))
    print(f"{torch.cuda.get_device_name()}, Python {platform.python_version()}, torch {torch.__version__}")
    calls_without_gradient(plain, layer, double)
    for rows in TRAINING_ROWS:
        training_calls(rows, plain, layer, double)


def training_calls(rows: int, plain: torch.nn.Linear, *layers: fourbit.nn.Linear4bit) -> None:
    """Of forward and backward."""
    contenders: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"torch nn.Linear": plain}
    contenders |= zip(("fourbit Linear4bit", "fourbit Linear4bit, double-quantized"), layers, strict=True)
    contenders["autograd.Function that does nothing"] = Nothing.apply
    peer = bnb.linear(plain, torch.bfloat16)
    if peer is not None:
        contenders["bitsandbytes Linear4bit"] = peer
    x = torch.randn(rows, plain.in_features, dtype=torch.bfloat16, device="cuda")
    found = training_microseconds(contenders, x, rounds=31, wrap=synchronized)
    print("\n" + table(found, "torch nn.Linear", f"µs of the host, forward and backward, {rows} rows"))


@torch.inference_mode()
def calls_without_gradient(plain: torch.nn.Linear, layer: fourbit.nn.Linear4bit, double: fourbit.nn.Linear4bit) -> None:
    """Of forward alone."""
    x = torch.randn(1, plain.in_features, dtype=torch.bfloat16, device="cuda")
    packed, state = layer.quant_state()
    calls = {
        "torch nn.Linear": lambda: plain(x),
        "fourbit Linear4bit": lambda: layer(x),
        "fourbit Linear4bit, double-quantized": lambda: double(x),
        "fourbit.linear_4bit": lambda: fourbit.linear_4bit(x, packed, state),
        "torch.empty": lambda: torch.empty((1, plain.in_features), dtype=torch.bfloat16, device="cuda"),
    }
    peer = bnb.linear(plain, torch.bfloat16)
    if peer is not None:
        peer.eval()
        calls["bitsandbytes Linear4bit"] = lambda: peer(x)
    found = microseconds({name: synchronized(call) for name, call in calls.items()}, rounds=31)
    print("host time of a whole call:")
    for name, value in found.items():
        print(f"  {name:40} {value:6.1f} us   {value / found['torch nn.Linear']:.2f} of torch's nn.Linear")
    print("from the call to the driver's launch:")
    print(f"  {'fourbit Linear4bit':40} {to_the_launch(layer, x):6.1f} us")
    print(f"  {'fourbit Linear4bit, double-quantized':40} {to_the_launch(double, x):6.1f} us")


if __name__ == "__main__":
    main()
