"""Prints what a call costs the host on a GPU: from Linear4bit.__call__ to the driver's launch, and whole calls.

    python -m peers.host_time_cuda

Whole calls are those of torch's nn.Linear and of bitsandbytes' Linear4bit too, interleaved; so are a layer's forward
and backward to x, its weight frozen, as in training with adapters (target: 1.3 of nn.Linear's). "To the launch" is the
time from the call to the entry of cuLaunchKernelEx, measured by a stand-in for that function: without the driver's
own part. The layers are small, so that the GPU is never waited for.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from statistics import median

import torch

import fourbit
from fourbit_cuda.driver import launcher
from harness import bnb
from harness.calls import microseconds

SIZE = 256
TORCH = "torch nn.Linear"


def synchronized(call):
    """`call`, with the queue drained every 64 calls, so that no call waits for room in it."""
    count = 0

    def run():
        nonlocal count
        count += 1
        if count % 64 == 0:
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
    kept = [kernel._launch for kernel in kernels]
    for kernel in kernels:
        kernel._launch = entered
    samples = []
    try:
        for _ in range(rounds):
            times.clear()
            start = time.perf_counter_ns()
            layer(x)
            samples.append((times[-1] - start) / 1e3)
    finally:
        for kernel, function in zip(kernels, kept, strict=True):
            kernel._launch = function
    return median(samples)


def forward_backward(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """A call of the layer and the gradient for x."""
    x = x.detach().clone().requires_grad_()
    gradient = torch.ones_like(layer(x))
    return lambda: torch.autograd.grad(layer(x), x, gradient)


def layers(device: str) -> dict[str, torch.nn.Module]:
    """torch's, frozen, and the 4-bit forms of it."""
    plain = torch.nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16, device=device).requires_grad_(False)
    found = {
        TORCH: plain,
        "fourbit Linear4bit": fourbit.nn.Linear4bit.from_linear(plain),
        "fourbit Linear4bit, double-quantized": fourbit.nn.Linear4bit.from_linear(
            plain, fourbit.QuantConfig(double_quant=True)
        ),
    }
    peer = bnb.linear(plain, torch.bfloat16)
    return found if peer is None else {**found, "bitsandbytes Linear4bit": peer}


def print_calls(what: str, calls: dict[str, Callable[[], object]], rounds: int = 31) -> None:
    """Time and print."""
    found = microseconds({name: synchronized(call) for name, call in calls.items()}, rounds=rounds)
    print(f"{what}:")
    for name, value in found.items():
        print(f"  {name:40} {value:6.1f} us   {value / found[TORCH]:.2f} of torch's nn.Linear")


def main() -> None:
    """Measure and print."""
    torch.manual_seed(0)
    found = layers("cuda")
    x = torch.randn(1, SIZE, dtype=torch.bfloat16, device="cuda")
    print(f"{torch.cuda.get_device_name()}, Python {platform.python_version()}, torch {torch.__version__}")
    print_calls(
        "host time of forward and backward", {name: forward_backward(layer, x) for name, layer in found.items()}
    )
    ours, double = (layer for name, layer in found.items() if name.startswith("fourbit"))
    packed, state = ours.quant_state()
    with torch.inference_mode():
        calls = {name: lambda layer=layer: layer(x) for name, layer in found.items()}
        calls["fourbit.linear_4bit"] = lambda: fourbit.linear_4bit(x, packed, state)
        calls["torch.empty"] = lambda: torch.empty((1, SIZE), dtype=torch.bfloat16, device="cuda")
        for layer in found.values():
            layer.eval()
        print_calls("host time of a whole call", calls)
        print("from the call to the driver's launch:")
        print(f"  {'fourbit Linear4bit':40} {to_the_launch(ours, x):6.1f} us")
        print(f"  {'fourbit Linear4bit, double-quantized':40} {to_the_launch(double, x):6.1f} us")


if __name__ == "__main__":
    main()
