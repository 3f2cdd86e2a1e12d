"""Prints what fourbit adds to a call and to an import, in one process, beside torch and bitsandbytes.

    python -m peers.host_time

Every row is a median of interleaved rounds, so the differences hold also on a busy machine.
"""

from __future__ import annotations

import platform
from statistics import median

import torch

import fourbit
from harness import bnb
from harness.calls import import_milliseconds, microseconds
from harness.null_backend import overhead_calls, training_layers
from harness.training import table, training_microseconds


def main() -> None:
    """Measure and print."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with overhead_calls() as (calls, plain, x):
        calls["torch nn.Linear, its kernel included"] = lambda: plain(x)
        peer = bnb.linear(plain, torch.float32)
        if peer is not None:
            calls["bitsandbytes Linear4bit, its kernel included"] = lambda: peer(x)
        times = microseconds(calls)
    with training_layers() as (layers, x):
        trained = bnb.linear(layers["torch nn.Linear"], torch.float32)
        if trained is not None:
            layers["bitsandbytes Linear4bit, its kernels included"] = trained
        training = training_microseconds(layers, x)
    base = next(iter(times.values()))
    print(f"Python {platform.python_version()}, torch {torch.__version__}, fourbit {fourbit.__version__}\n")
    print(f"{'µs a call, x [1, 64], weight [64, 64]':48s} {'median':>7s} {'over the method':>16s}")
    for name, value in times.items():
        print(f"{name:48s} {value:7.2f} {value - base:16.2f}")
    print("\n" + table(training, "torch nn.Linear", "µs of forward and backward, the same sizes"))
    imports = import_milliseconds()
    print(f"\nimport fourbit after import torch: median {median(imports):.1f} ms, least {imports[0]:.1f} ms")


if __name__ == "__main__":
    main()
