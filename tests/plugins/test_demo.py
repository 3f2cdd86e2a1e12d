"""`fourbit demo` on the real model, as a user runs it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from fourbit.state import quantized_nbytes
from fourbit_demo import sample_model
from tests.support import skip_or_fail

pytestmark = pytest.mark.long

# SmolLM2-135M: 30 layers of q, o [576, 576], k, v [192, 576], gate, up [1536, 576], down [576, 1536]
LAYERS = 30
LINEARS = 2 * [576 * 576] + 2 * [192 * 576] + 3 * [1536 * 576]
EMBEDDING = 49152 * 576
NORMS = 61 * 576


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's JSON, and where it kept the folders."""
    for name in ("transformers", "gguf"):
        if find_spec(name) is None:
            skip_or_fail(f"{name} is not installed: the demo is not run")
    try:
        sample_model.find_weights()
    except sample_model.SampleModelError as error:
        skip_or_fail(f"the demo is not run: {error}")
    folder = tmp_path_factory.mktemp("demo") / "kept"
    command = [sys.executable, "-m", "fourbit.cli", "demo", "--json", "--keep", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder


def test_sizes_come_from_arithmetic(demo):
    result, folder = demo
    quantized, other = LAYERS * sum(LINEARS), EMBEDDING + NORMS
    packed = LAYERS * sum(quantized_nbytes(n, 64, True) for n in LINEARS)
    before, after = result["before"], result["after"]
    assert result["model"]["parameters"] == quantized + other
    assert result["quantized_parameters"] == quantized
    assert before["bytes"] == 2 * (quantized + other)
    assert before["bits_per_quantized_parameter"] == before["bits_per_parameter"] == 16
    assert after["bits_per_quantized_parameter"] == pytest.approx(8 * packed / quantized)
    assert round(after["bits_per_quantized_parameter"], 3) == 4.127
    tables = after["bytes"] - packed - 2 * other  # code tables and JSON of 210 weights
    assert 210 * (16 + 256) * 4 < tables < 210 * 1500
    assert after["bits_per_parameter"] == pytest.approx(8 * after["bytes"] / (quantized + other))
    assert result["large_left"] == []
    for name, part in (("16bit", before), ("4bit", after)):
        file = folder / name / "model.safetensors"
        assert part["bytes"] < os.path.getsize(file) < part["bytes"] + 200_000


def test_quality_is_sane(demo):
    result, _ = demo
    base, quantized = result["before"]["perplexity"], result["after"]["perplexity"]
    assert math.isfinite(quantized) and 5 < base < 40
    assert 1.02 * base < quantized < 1.6 * base  # not the 16-bit model again, and not broken
    assert result["before"]["text_sha256"] == result["after"]["text_sha256"]
    assert all(len(result[part]["text"].split()) > 3 for part in ("before", "after"))


def test_backends_are_those_that_ran(demo):
    result, _ = demo
    ran = {op["op"]: op for op in result["ops"]}
    assert {"quantize_4bit", "linear_4bit"} <= set(ran)
    for op in result["ops"]:
        assert op["backend"] and op["device"] == "cpu"
    assert (ran["linear_4bit"]["blocksize"], ran["linear_4bit"]["double_quant"]) == (64, True)
    assert result["before"]["ops"] == []  # nothing of ours ran in the 16-bit model


def test_seconds_and_machine(demo):
    result, _ = demo
    seconds = dict(result["seconds"])
    total = seconds.pop("total")
    assert set(seconds) == {"weights", "16-bit folder", "quantize", "16-bit model", "4-bit model"}
    assert 0 < sum(seconds.values()) <= total * 1.01
    assert {"python", "torch", "cores"} <= set(result["machine"])
