"""CUDA graphs: captured after a warm-up, refused with a clear message without one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fourbit
from fourbit.testing.oracle import assert_same_bits
from fourbit_gpu.warmup import warmup


@pytest.mark.parametrize("double_quant", (False, True), ids=("plain", "double"))
@pytest.mark.parametrize("rows", (1, 3, 40))
def test_linear_replayed(device, rows, double_quant):
    """A replay follows the data in the captured input, and gives the bits of the eager call."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 384, dtype=torch.bfloat16, device=device)
    layer = fourbit.nn.Linear4bit.from_linear(linear, fourbit.QuantConfig(double_quant=double_quant))
    x = torch.zeros(rows, 512, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        assert warmup(layer, rows=(rows,)) == 1
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for seed in range(3):
            torch.manual_seed(seed)
            x.copy_(torch.randn(rows, 512))
            graph.replay()
            assert_same_bits(y, layer(x).cpu(), f"replay {seed}")


def test_other_ops_replayed(device):
    w = torch.randn(300, 77, device=device)
    ids = torch.tensor([0, 299, 3], device=device)
    packed, state = fourbit.quantize_4bit(w, double_quant=True)

    def everything():
        again, _ = fourbit.quantize_4bit(w)
        dense = fourbit.dequantize_4bit(packed, state, torch.float16)
        rows = fourbit.embedding_4bit(ids, packed, state)
        codes, absmax = fourbit.quantize_blockwise(w)
        return again, dense, rows, codes, absmax, fourbit.dequantize_blockwise(codes, absmax)

    want = everything()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = everything()
    for each in results:
        each.fill_(1)
    graph.replay()
    for name, result, expected in zip(
        ("packed", "dense", "rows", "codes", "absmax", "values"), results, want, strict=True
    ):
        assert_same_bits(result, expected.cpu(), name)


PROGRAM = """
import torch, fourbit
weight = fourbit.testing.oracle.make_weight(64, 64)
packed, state = weight.packed.cuda(), weight.state("cuda")
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        fourbit.dequantize_4bit(packed, state)
except RuntimeError as error:
    assert "is not loaded yet" in str(error) and "before the capture" in str(error), error
    print("refused")
out = fourbit.dequantize_4bit(packed, state)  # the process is none the worse
assert torch.equal(out.cpu(), weight.dense())
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = fourbit.dequantize_4bit(packed, state)
graph.replay()
assert torch.equal(out.cpu(), weight.dense())
print("fine")
"""


def test_a_kernel_that_is_not_loaded_is_refused_during_capture(device):
    program = "import fourbit.testing.oracle\n" + PROGRAM
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["refused", "fine"], done.stdout + done.stderr
