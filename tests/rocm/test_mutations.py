"""Kernels broken by hand: the emulator, or the comparison with the reference, must notice each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from fourbit.codebooks import dynamic_map
from fourbit.testing.oracle import make_weight
from fourbit_gpu import program
from fourbit_gpu.spec import KernelSpec
from tests.rocm.gcn.errors import EmulatorError, MemoryFault, RaceError, UninitializedRead
from tests.rocm.test_kernels import CODEBOOKS, REFERENCE, assert_quantizes, assert_same_bits, check_linear, values


@cache
def quantize(blocksize: int, count: int, dtype: torch.dtype = torch.float32) -> Callable[[object], None]:
    return lambda backend: assert_quantizes(backend, values(count, dtype), CODEBOOKS["unordered"], blocksize)


def dequantize(backend: object) -> None:
    weight = make_weight(4099, blocksize=64, double_quant=True)
    args = (weight.weight(), (4099,), torch.float32)
    assert_same_bits(backend.dequantize_4bit(*args), REFERENCE.dequantize_4bit(*args), "values")


def blockwise(backend: object) -> None:
    x = values(700, torch.float32)
    codes, absmax = backend.quantize_blockwise(x, dynamic_map(), 256)
    assert_same_bits(codes, REFERENCE.quantize_blockwise(x, dynamic_map(), 256)[0], "codes")
    args = (codes, absmax, dynamic_map(), 256, torch.float16)
    assert_same_bits(backend.dequantize_blockwise(*args), REFERENCE.dequantize_blockwise(*args), "values")


def embedding(backend: object) -> None:
    weight = make_weight(23, 70, blocksize=64)
    ids, args = torch.tensor([3, 22, 0]), (weight.weight(), 23, 70, torch.float16)
    assert_same_bits(backend.embedding_4bit(ids, *args), REFERENCE.embedding_4bit(ids, *args), "rows")


@cache
def linear(dtype: torch.dtype, m: int, n: int, k: int, blocksize: int = 64) -> Callable[[object], None]:
    return lambda backend: check_linear(backend, dtype, m, n, k, blocksize, False)


@dataclass(frozen=True)
class Mutation:
    """`old`, the only place in `file`, becomes `new`; `run` must then raise `error` on `arch`."""

    name: str
    file: str
    old: str
    new: str
    run: Callable[[object], None]
    error: type[BaseException] = AssertionError
    arch: str = "gfx90a"


BF16, F32 = torch.bfloat16, torch.float32
FMAX = "    u32 wave = threadIdx.x / FB_WAVE, first = threadIdx.x / LANES * (LANES / FB_WAVE);\n    block_barrier();"
MUTATIONS = (
    Mutation(
        *("a reduction over 32 lanes on waves of 64", "blocks.h"),
        *("(LANES < FB_WAVE ? LANES : FB_WAVE) / 2", "(LANES < 32 ? LANES : 32) / 2", quantize(512, 2000)),
    ),
    Mutation(
        *("a shuffle within 32 lanes", "shim.h", "(int)(lane_id() ^ (u32)mask) << 2"),
        *("(int)(lane_id() ^ ((u32)mask & 31)) << 2", quantize(512, 2000)),
    ),
    Mutation(
        *("no barrier before the codebook's edges", "codebook.h"),
        *(
            "            if (rank != thread) ordered = 0;\n        }\n        block_barrier();",
            "            if (rank != thread) ordered = 0;\n        }",
        ),
        *(blockwise, RaceError),
    ),
    Mutation(
        *(
            "no barrier after the table of dequantize",
            "dequantize.cu",
            "block_barrier();  // the table;",
            "// the table;",
            dequantize,
            RaceError,
        ),
    ),
    Mutation(
        *("no barrier before the scratch is used again", "blocks.h", FMAX, FMAX.rpartition("\n")[0]),
        *(quantize(4096, 40000), RaceError),
    ),
    Mutation(
        *("a barrier that orders no memory of its own is gone: block_count", "shim.h"),
        *(
            "    block_barrier();\n    u32 total = 0;",
            "    u32 total = 0;",
            quantize(64, 300),
            EmulatorError,
            "gfx1030",
        ),
    ),
    Mutation(
        *("no bounds check in dequantize", "dequantize.cu"),
        *("if (start + i < count) store1", "store1", dequantize, MemoryFault),
    ),
    Mutation(
        *("no bounds check in quantize", "quantize.cu"),
        *("bool whole = base + tile <= count;", "bool whole = base < count;", quantize(64, 301), MemoryFault),
    ),
    Mutation(
        *("a load past the end of x", "quantize.cu", "count, aligned && base + tile <= count);"),
        *("count, aligned);", quantize(64, 301), MemoryFault),
    ),
    Mutation(
        *("a part of the table left out: LDS that nobody wrote", "dequantize.cu"),
        *("if (threadIdx.x < 16) table", "if (threadIdx.x < 13) table", dequantize, UninitializedRead),
    ),
    Mutation(
        *("a part of the 8-bit table left out", "blockwise.cu"),
        *("i < 256; i += THREADS) table", "i < 250; i += THREADS) table", blockwise, UninitializedRead),
    ),
    Mutation(
        *("scales contracted into one fma", "packed.h"),
        *("add_rn(mul_rn(code, nested_absmax[block >> 8]), offset)",),
        *("__builtin_fmaf(code, nested_absmax[block >> 8], offset)", dequantize),
    ),
    Mutation(
        "the scale of the next block", "embedding.cu", "element + i >> shift", "element + i + 1 >> shift", embedding
    ),
    Mutation(
        *("vector: rows past the end", "linear_vector.cu"),
        *("i64 row = top + r < n ? top + r : n - 1;  // past", "i64 row = top + r;  // past"),
        *(linear(F32, 2, 9, 192), MemoryFault, "gfx1030"),
    ),
    Mutation(
        *("vector: results past the end", "linear_vector.cu", "i < m && top + r < n)", "i < m)"),
        *(linear(F32, 2, 9, 192), MemoryFault, "gfx1030"),
    ),
    Mutation(
        *("vector: half of a wave left out of the sum", "linear_vector.cu"),
        *("int mask = FB_WAVE / 2; mask", "int mask = 16; mask", linear(F32, 2, 9, 512)),
    ),
    Mutation(
        *("vector: the scale of the row's first block", "linear_vector.cu"),
        *("scales(element >> shift)", "scales(row * k >> shift)", linear(F32, 1, 9, 512)),
    ),
    Mutation(
        *("matrix cores: no barrier before the sum of the waves", "linear_mfma.cu"),
        *("total[v];\n        block_barrier();", "total[v];", linear(BF16, 3, 20, 512), EmulatorError),
    ),
    Mutation(
        *("matrix cores: no barrier before the next tile's sums", "linear_mfma.cu"),
        *("        block_barrier();  // before", "        // before", linear(BF16, 3, 200, 512), RaceError),
    ),
    Mutation(
        *("matrix cores: a fragment of x from the wrong place", "linear_mfma.cu"),
        *("{x0.z, x0.w}, {x1.x, x1.y}", "{x1.x, x1.y}, {x0.z, x0.w}", linear(BF16, 3, 20, 128)),
    ),
    Mutation(
        *("matrix cores: rows of w past the end", "linear_mfma.cu"),
        *("const i64 row = top + r < n ? top + r : n - 1;", "const i64 row = top + r;"),
        *(linear(BF16, 3, 20, 128), MemoryFault),
    ),
)


QUICK = ("no barrier after the table of dequantize", "vector: results past the end")
"""What a short run takes of them: one for either wave size."""

_passed: set[tuple[Callable[[object], None], str]] = set()
"""What has run unbroken, and where: several mutations share it."""


@pytest.mark.parametrize(
    "mutation",
    [pytest.param(each, marks=() if each.name in QUICK else pytest.mark.long, id=each.name) for each in MUTATIONS],
)
def test_a_broken_kernel_is_noticed(mutation, on, monkeypatch):
    whole = program.program
    changed = []

    def mutated(spec: KernelSpec) -> tuple[str, dict[str, str]]:
        text, headers = whole(spec)
        files = {spec.source: text, **headers}
        if mutation.file in files:
            assert files[mutation.file].count(mutation.old) == 1, f"{mutation.old!r} is not in {mutation.file} once"
            files[mutation.file] = files[mutation.file].replace(mutation.old, mutation.new)
            changed.append(spec)
        return files.pop(spec.source), files

    if (mutation.run, mutation.arch) not in _passed:  # as it is, it passes
        mutation.run(on(mutation.arch))
        _passed.add((mutation.run, mutation.arch))
    monkeypatch.setattr(program, "program", mutated)
    with pytest.raises(mutation.error):
        mutation.run(on(mutation.arch))
    assert changed
