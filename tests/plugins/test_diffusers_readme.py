"""The recipes of plugins/fourbit_diffusers/README.md, run as they stand, with a tiny pipeline for a large one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fourbit
from tests.plugins.diffusers_models import save_pipeline
from tests.support import installed, skip_or_fail

if not all(installed(name) for name in ("diffusers", "transformers", "peft")):
    skip_or_fail("diffusers, transformers or peft is not installed: pip install 'fourbit[test]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

README = Path(__file__).parents[2] / "plugins" / "fourbit_diffusers" / "README.md"


def test_recipes(tmp_path, monkeypatch):
    save_pipeline(tmp_path / "stable-diffusion-v1-5" / "stable-diffusion-v1-5")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 5
    names = {"torch": torch}
    seen = []
    if not installed("bitsandbytes"):  # without which diffusers makes no BitsAndBytesConfig for 4 bits
        blocks.pop()
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
        model = names["model"] if "model" in names else names["pipe"].unet
        seen.append(any(isinstance(module, fourbit.nn.Linear4bit) for module in model.modules()))
    assert seen == [True, False, True, True, True][: len(blocks)]  # the second ends with dequantize()
    assert {path.name for path in tmp_path.iterdir()} == {"stable-diffusion-v1-5", "sd-4bit", "unet-4bit", "lora"}
