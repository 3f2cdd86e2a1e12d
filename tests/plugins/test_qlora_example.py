"""The QLoRA example in its short form: as a command, resumed, merged, and beside bitsandbytes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import installed, need, skip_or_fail

need("transformers", "peft", "trl", "datasets", "accelerate", extra="train")

from fourbit_demo import sample_model  # noqa: E402
from fourbit_transformers.examples import qlora  # noqa: E402

pytestmark = [
    # all of them others'
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
STEPS = 12
LLAMA = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
"""Weights of the tiny model's linear layers."""


@dataclass
class Run:
    result: dict[str, Any]
    folder: Path

    @property
    def losses(self):
        return self.result["losses"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(*options)` runs the example in its short form, each in a folder of its own if `output` is not given."""

    def start(*more: str, output: Path | None = None) -> Run:
        folder = output or tmp_path_factory.mktemp("qlora")
        chosen = qlora.options(["--small", "--steps", str(STEPS), "--output", str(folder), *more])
        return Run(qlora.run(chosen), folder)

    return start


@pytest.fixture(scope="module")
def whole(run):
    with pytest.warns():  # others'; a fixture of a module has no marks
        return run()


def test_it_trains(whole):
    result = whole.result
    assert result["steps"] == STEPS == len(whole.losses)
    assert whole.losses[-1] < whole.losses[0] - 0.2
    found = result["perplexity"]
    assert found["trained"] < 0.8 * found["quantized, before"]
    assert (result["quantizer"], result["device"]) == ("fourbit", "cpu")


def test_parameters_and_bytes(whole):
    result = whole.result
    vocabulary, norms = 384, 5 * 64
    base = LLAMA + 2 * vocabulary * 64 + norms
    lora = 2 * 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert (result["parameters"], result["trainable"]) == (base + lora, lora)
    packed = LLAMA // 2 + 4 * LLAMA // 64 + 14 * 16 * 4  # codes, scales, code tables
    rest = 4 * (2 * vocabulary * 64 + norms + lora)
    assert result["bytes"] == pytest.approx(packed + rest, abs=256)  # and buffers


def test_merged_it_is_the_trained_model_in_16_bit(whole):
    from safetensors.torch import load_file

    found = whole.result["perplexity"]
    assert found["merged to 16 bit, reloaded"] == pytest.approx(found["trained"], rel=2e-3)
    folder = Path(whole.result["merged"])
    tensors = load_file(folder / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert tensors.keys() == load_file(whole.folder / "tiny-llama" / "model.safetensors").keys()


def test_resumed_it_is_the_uninterrupted_run(whole, run):
    stopped = run("--stop-after", "7")
    assert stopped.losses == whole.losses[:7]
    assert stopped.result["steps"] == 7 and "trained" not in stopped.result["perplexity"]
    resumed = run("--resume", output=stopped.folder)
    assert resumed.losses == whole.losses
    assert resumed.result["perplexity"] == whole.result["perplexity"]


def test_double_quantized(run, whole):
    doubled = run("--double-quant").result
    # of a model this small the tables of 256 8-bit codes are more than what the scales save
    assert doubled["bytes"] == whole.result["bytes"] - 3 * LLAMA // 64 + 14 * (256 + 1 + 1) * 4
    assert doubled["losses"] == pytest.approx(whole.losses, abs=0.05) and doubled["losses"] != whole.losses


@pytest.mark.skipif(not installed("bitsandbytes"), reason="bitsandbytes is not installed")
def test_losses_are_those_on_bitsandbytes(whole, run):
    theirs = run("--bitsandbytes").result
    assert theirs["quantizer"] == "bitsandbytes" and len(theirs["losses"]) == STEPS
    assert whole.losses == pytest.approx(theirs["losses"], abs=1e-3)
    for name, value in theirs["perplexity"].items():
        assert whole.result["perplexity"][name] == pytest.approx(value, rel=1e-3)


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "fourbit_transformers.examples.qlora", "--small", "--steps", "2", "--json"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2  # and nothing else is on stdout


@pytest.mark.parametrize("wrong", (["--steps", "0"], ["--steps", "5", "--stop-after", "5"], ["--stop-after", "0"]))
def test_options_are_checked(wrong, capsys):
    with pytest.raises(SystemExit):
        qlora.options(wrong)
    assert "--steps takes a positive number" in capsys.readouterr().err


@pytest.mark.long
def test_smollm2(tmp_path):
    try:
        sample_model.find_weights()
    except sample_model.SampleModelError as error:
        skip_or_fail(f"SmolLM2's weights cannot be had: {error}")
    result = qlora.run(qlora.options(["--steps", "6", "--output", str(tmp_path)]))
    found = result["perplexity"]
    assert 20 < found["quantized, before"] < 40
    assert found["trained"] < found["quantized, before"]
    assert found["merged to 16 bit, reloaded"] == pytest.approx(found["trained"], rel=0.02)
