"""Decode and prefill of an 8B-shaped Llama divided over several GPUs by torch's parallel styles, 4-bit beside bfloat16.

    for n in 1 2 4; do torchrun --nproc-per-node $n -m peers.tensor_parallel --json tp$n.json; done
    torchrun --nproc-per-node 2 -m peers.tensor_parallel --device cpu --layers 1 --hidden 256 --inner 512 --prompt 16

The blocks of Llama 3.1 8B (no embedding; the output head in bfloat16 for both) with random weights, parallelize_module
with ColwiseParallel and RowwiseParallel, NCCL (gloo on CPUs). Contenders take turns. A decode step has a cache of
`--context` tokens; it runs as a CUDA graph and, for what the host costs, without. Process 0 prints, of the times the
slowest process's.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import fourbit
from harness import machine
from harness.timing import Times, milliseconds

HEAD_DIM = 128


class Block(nn.Module):
    """A decoder block; `heads` and `kv_heads` are this process's."""

    def __init__(self, hidden: int, inner: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.q = nn.Linear(hidden, heads * HEAD_DIM, bias=False)
        self.k = nn.Linear(hidden, kv_heads * HEAD_DIM, bias=False)
        self.v = nn.Linear(hidden, kv_heads * HEAD_DIM, bias=False)
        self.o = nn.Linear(heads * HEAD_DIM, hidden, bias=False)
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2))
        self.cache: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, tokens, hidden]; one token attends to the cache, whose last place it takes, more to each other."""
        y = self.norms[0](x)
        q, k, v = (layer(y).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if x.shape[1] == 1 and self.cache is not None:
            for held, new in zip(self.cache, (k, v), strict=True):
                held[:, :, -1:] = new
            k, v = self.cache
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    """The blocks and the output head."""

    def __init__(self, blocks: list[Block], head: nn.Linear) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, tokens, hidden] to the logits of the last token."""
        for block in self.blocks:
            x = block(x)
        last: Tensor = self.head(x[:, -1:])
        return last


def divide(module: nn.Module, mesh: Any) -> nn.Module:
    """By the plan of every Llama; nothing for one process."""
    if mesh.size() == 1:
        return module
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if isinstance(module, nn.Linear):
        return parallelize_module(module, mesh, ColwiseParallel(output_layouts=Replicate()))
    plan: dict[str, Any] = {name: ColwiseParallel() for name in ("q", "k", "v", "gate", "up")}
    return parallelize_module(module, mesh, plan | {name: RowwiseParallel() for name in ("o", "down")})


def build(options: argparse.Namespace, config: fourbit.QuantConfig | None, mesh: Any, device: torch.device) -> Model:
    """The model in bfloat16, or with 4-bit blocks; block by block, so that a device holds one undivided at a time."""

    def filled(module: nn.Module) -> nn.Module:
        for parameter in module.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        return module

    torch.manual_seed(0)
    blocks: list[Any] = []
    with torch.device(device):
        for _ in range(options.layers):
            block = filled(Block(options.hidden, options.inner, options.heads, options.kv_heads).bfloat16())
            if config is not None:
                block = fourbit.quantize_model(block, config)
            blocks.append(divide(block, mesh))
        head = divide(filled(nn.Linear(options.hidden, options.vocabulary, bias=False).bfloat16()), mesh)
    return Model(blocks, head).requires_grad_(False)  # type: ignore[arg-type]


def fill_caches(model: Model, batch: int, options: argparse.Namespace, parts: int, device: torch.device) -> None:
    """Random keys and values of `--context` tokens, of this process's heads."""
    shape = (batch, options.kv_heads // parts, options.context, HEAD_DIM)
    for block in model.blocks:
        pair = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        block.cache = tuple(pair)  # type: ignore[assignment]


def graphed(step: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """A replay of `step` as a CUDA graph, and the tensor that it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph.replay, out


def timed(calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, Times]:
    """Seconds of each call, in turn, of the slowest process."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    samples: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            wait()
            dist.barrier()
            begin = time.perf_counter()
            call()
            wait()
            slowest = torch.tensor(time.perf_counter() - begin, device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if index:  # the first warms up
                samples[name].append(float(slowest))
    return {name: Times.of(taken) for name, taken in samples.items()}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="An 8B-shaped Llama over several GPUs, 4-bit beside bfloat16.")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--batch", default="1,8", help="of the decode steps")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of a prefill")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--double-quant", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


@torch.no_grad()  # in inference mode DTensor works out each sharding anew, at eight times the host's time
def main() -> None:
    """Measure and print."""
    options = arguments()
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(options.device, rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    from torch.distributed.device_mesh import init_device_mesh

    parts = dist.get_world_size()
    if options.heads % parts or options.kv_heads % parts:
        raise SystemExit(f"{options.heads} and {options.kv_heads} heads cannot be divided among {parts} processes")
    mesh = init_device_mesh(device.type, (parts,))
    about = machine.about()
    say = print if dist.get_rank() == 0 else (lambda *_, **__: None)
    if dist.get_rank() == 0:
        machine.print_about(about)
    models, sizes = {}, {}
    for name in ("bf16", "4-bit"):
        config = fourbit.QuantConfig(blocksize=64, double_quant=options.double_quant) if name == "4-bit" else None
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        models[name] = build(options, config, mesh, device)
        sizes[name] = (torch.cuda.memory_allocated() if device.type == "cuda" else 0) - before
    if device.type == "cuda":
        say(f"{parts} GPUs: " + ", ".join(f"{name} {size / 2**30:.2f} GiB each" for name, size in sizes.items()))
    rows: list[dict[str, Any]] = []

    def show(what: str, tokens: int, calls: dict[str, Callable[[], Any]], rounds: int) -> None:
        times = timed(calls, rounds, device)
        ratio = times["bf16"].median / times["4-bit"].median
        text = "; ".join(f"{name} {milliseconds(t)} ms, {tokens / t.median:.0f} tokens/s" for name, t in times.items())
        say(f"{parts} processes, {what}: {text}; ratio {ratio:.2f}", flush=True)
        rows.append({"processes": parts, "what": what, "ratio": ratio, **{n: t.median for n, t in times.items()}})

    for batch in map(int, options.batch.split(",")):
        x = torch.randn(batch, 1, options.hidden, dtype=torch.bfloat16, device=device)
        for model in models.values():
            fill_caches(model, batch, options, parts, device)
        steps = {name: partial(model, x) for name, model in models.items()}
        show(f"decode, batch {batch}, eager", batch, steps, options.rounds)
        if device.type == "cuda":
            replays = {name: graphed(step) for name, step in steps.items()}
            show(f"decode, batch {batch}, CUDA graph", batch, {n: r for n, (r, _) in replays.items()}, options.rounds)
            del replays  # NCCL waits for graphs that hold its kernels when the group ends
    x = torch.randn(1, options.prompt, options.hidden, dtype=torch.bfloat16, device=device)
    prefill = {name: partial(model, x) for name, model in models.items()}
    show(f"prefill of {options.prompt}", options.prompt, prefill, max(options.rounds // 5, 3))
    if options.json and dist.get_rank() == 0:
        Path(options.json).write_text(json.dumps({**about, "gpu_bytes": sizes, "rows": rows}, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
