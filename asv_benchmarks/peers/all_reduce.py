"""Prints what an all-reduce of activations costs among the GPUs of one host, which tensor-parallel decoding waits for.

    torchrun --nproc-per-node 4 -m peers.all_reduce

Sizes are rows × hidden in bfloat16. Times are medians over replays of a CUDA graph of 20, which leaves the host out,
and "eager" over calls one by one. `--device cpu` does it with gloo, to try the script.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist

HIDDEN = (4096, 7168, 16384)
ROWS = (1, 4, 16, 64, 512)
REPEATS = 20


def seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median of a call."""
    times = []
    for i in range(rounds + 3):
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 3:
            times.append(time.perf_counter() - start)
    return median(times)


def graphed(x: torch.Tensor) -> Callable[[], object]:
    """A replay of REPEATS all-reduces."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        dist.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(REPEATS):
            dist.all_reduce(x)
    return graph.replay


def main() -> None:
    """One table, printed by the first process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    dist.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device(arguments.device, rank) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rank == 0:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPUs, gloo"
        print(f"{size} × {name}, torch {torch.__version__}\n")
        print("| rows × hidden | kB | µs, in a graph | µs, eager |\n|---|---|---|---|")
    for hidden in HIDDEN:
        for rows in ROWS:
            x = torch.zeros(rows, hidden, dtype=torch.bfloat16, device=device)
            eager = seconds(lambda x=x: dist.all_reduce(x), device, arguments.rounds)
            inside = seconds(graphed(x), device, arguments.rounds) / REPEATS if device.type == "cuda" else float("nan")
            if rank == 0:
                print(
                    f"| {rows} × {hidden} | {x.nbytes / 1e3:.0f} | {1e6 * inside:.1f} | {1e6 * eager:.1f} |", flush=True
                )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
