"""Memory and tokens a second of models too large to try here, from their shapes and from measured kernels.

    python -m fourbit_vllm.estimate [--gpus 8] [--all-reduce-us 20] [--context 4096]

It prints the tables of this folder's README. Decoding one token for each of `batch` sequences takes, on each rank, the
time of its products, of reading the KV cache, and of the all-reduces; nothing is overlapped, and what else a step has
(norms, rotary embeddings, sampling, the host) is not counted, so that these are bounds from above.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from fourbit.state import quantized_nbytes

GB = 1e9
COPY = 2.982e12
"""Bytes a second of a copy on an H100 80GB HBM3, read and written (RESULTS.md, "CUDA backend beside its peers")."""

MEASURED: dict[int, tuple[tuple[int, int, float], ...]] = {
    1: ((4096, 4096, 6.5), (14336, 4096, 16.2), (8192, 8192, 17.6), (28672, 8192, 52.8)),
    16: ((4096, 4096, 10.2), (14336, 4096, 23.5), (8192, 8192, 22.7), (28672, 8192, 61.1)),
}
"""`linear_4bit`, NF4, blocks of 64, bfloat16: (out, in, microseconds) by rows of x, from the same table."""


@dataclass(frozen=True)
class Product:
    """A linear layer as one rank has it: `count` matrices [out, in] a layer of the model, in `layers` of them."""

    out: int
    width: int
    layers: int
    count: int = 1
    used: float = 1
    """Of `count`, those that a token needs: experts."""

    @property
    def nbytes(self) -> int:
        """Of one matrix in 4 bits."""
        return quantized_nbytes(self.out * self.width, 64, False)


@dataclass(frozen=True)
class Model:
    """A model on `gpus` ranks.

    Attributes:
        name: of it.
        products: of a rank.
        dense: bytes of a rank in 16 bit: embeddings, head, router, what vLLM keeps of latent attention.
        cache: bytes of a token in a rank's KV cache.
        reduces: all-reduces a token, over `hidden` elements.
        hidden: width.
    """

    name: str
    products: tuple[Product, ...]
    dense: int
    cache: int
    reduces: int
    hidden: int

    @property
    def weights(self) -> int:
        """Bytes of a rank."""
        return self.dense + sum(each.nbytes * each.count * each.layers for each in self.products)


def dense_405b(gpus: int) -> Model:
    """Llama 3.1 405B's shape: 126 layers of 16384, 128 heads and 8 of k and v, 53248 between, 128256 tokens."""
    layers, hidden, inner, heads, kv_heads, head, vocabulary = 126, 16384, 53248, 128, 8, 128, 128256
    qkv = (heads // gpus + 2 * max(kv_heads // gpus, 1)) * head
    products = (
        Product(qkv, hidden, layers),
        Product(hidden, heads * head // gpus, layers),
        Product(2 * inner // gpus, hidden, layers),
        Product(hidden, inner // gpus, layers),
    )
    cache = 2 * 2 * max(kv_heads // gpus, 1) * head * layers
    return Model("405B dense", products, 2 * 2 * vocabulary * hidden // gpus, cache, 2 * layers, hidden)


def moe_671b(gpus: int) -> Model:
    """DeepSeek-V3's shape: 61 layers of 7168, 3 of them dense; 256 experts of 2048, 8 used, 1 shared."""
    layers, first, hidden, vocabulary = 61, 3, 7168, 129280
    heads, q_rank, kv_rank, nope, rope, value = 128, 1536, 512, 128, 64, 128
    experts, used, inner, dense_inner = 256, 8, 2048, 18432
    sparse, mine = layers - first, heads // gpus
    products = (
        Product(q_rank + kv_rank + rope, hidden, layers),  # on every rank whole
        Product(mine * (nope + rope), q_rank, layers),
        Product(hidden, mine * value, layers),
        Product(2 * dense_inner // gpus, hidden, first),
        Product(hidden, dense_inner // gpus, first),
        Product(2 * inner // gpus, hidden, sparse, experts + 1, used + 1),
        Product(hidden, inner // gpus, sparse, experts + 1, used + 1),
    )
    # vLLM absorbs the up-projection of k and v into attention, in 16 bit, beside its 4-bit form, which decoding leaves
    up = mine * (nope + value) * kv_rank * layers
    kept = 2 * up + quantized_nbytes(up, 64, False)
    dense = 2 * 2 * vocabulary * hidden // gpus + 2 * experts * hidden * sparse + kept
    return Model("671B mixture", products, dense, 2 * (kv_rank + rope) * layers, 2 * layers, hidden)


def fit(rows: int) -> tuple[float, float]:
    """Seconds of a call, and bytes a second, by least squares through the measured products of so many rows."""
    points = [(quantized_nbytes(out * width, 64, False), time * 1e-6) for out, width, time in MEASURED[rows]]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - slope * mean_x, 1 / slope


def touched(product: Product, batch: int) -> float:
    """How many of a layer's matrices a step reads: of experts those that a token of the batch chose, at random."""
    if product.used == product.count:
        return product.count
    shared, chosen, all_ = 1, product.used - 1, product.count - 1
    return shared + all_ * (1 - float(1 - chosen / all_) ** batch)


def step(model: Model, batch: int, context: int, reduce_seconds: float) -> dict[str, float]:
    """Seconds of a rank's decoding step, by part. All matrices of a layer's experts are one call."""
    call, speed = fit(16 if batch > 4 else 1)
    products = sum(each.layers * (call + touched(each, batch) * each.nbytes / speed) for each in model.products)
    return {
        "products": products,
        "16 bit": model.dense / 2 / COPY,  # the head; of embeddings only rows are read
        "cache": batch * context * model.cache / COPY,
        "all-reduce": model.reduces * reduce_seconds,
    }


def lines(gpus: int, memory: float, batches: Iterable[int], context: int, reduce_seconds: float) -> Iterator[str]:
    """The tables, in Markdown."""
    models = [dense_405b(gpus), moe_671b(gpus)]
    free = 0.92 * memory * GB
    yield f"| on {gpus} GPUs of {memory:g} GB | " + " | ".join(model.name for model in models) + " |"
    yield "|---|" + "---|" * len(models)
    rows: dict[str, Callable[[Model], str]] = {
        "weights in 4 bits, GB a rank": lambda m: f"{(m.weights - m.dense) / GB:.1f}",
        "in 16 bit, GB a rank": lambda m: f"{m.dense / GB:.1f}",
        "left for the KV cache of 92 % of the memory, less 4 GB of activations": lambda m: (
            f"{(free - m.weights) / GB - 4:.1f}"
        ),
        "KV cache, bytes a token and rank": lambda m: f"{m.cache:,}",
        "tokens in it": lambda m: f"{(free - m.weights - 4 * GB) / m.cache:,.0f}",
        "all-reduces a step, bytes each a sequence": lambda m: f"{m.reduces}, {2 * m.hidden:,}",
    }
    for name, value in rows.items():
        yield f"| {name} | " + " | ".join(value(model) for model in models) + " |"
    yield ""
    yield f"| sequences of {context} tokens | model | ms: products | 16 bit | cache | all-reduce | tokens a second |"
    yield "|---|---|---|---|---|---|---|"
    for model in models:
        for batch in batches:
            parts = step(model, batch, context, reduce_seconds)
            total = sum(parts.values())
            cells = " | ".join(f"{1e3 * seconds:.1f}" for seconds in parts.values())
            yield f"| {batch} | {model.name} | {cells} | {batch / total:,.0f} |"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m fourbit_vllm.estimate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpus", type=int, default=8, choices=(1, 2, 4, 8))
    parser.add_argument("--memory-gb", type=float, default=80)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--all-reduce-us", type=float, default=20, help="of one; measure it with peers.all_reduce")
    arguments = parser.parse_args()
    batches = (1, 4, 16)
    for line in lines(arguments.gpus, arguments.memory_gb, batches, arguments.context, arguments.all_reduce_us * 1e-6):
        print(line)


if __name__ == "__main__":
    main()
