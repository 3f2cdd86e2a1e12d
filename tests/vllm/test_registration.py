"""What vLLM calls at its start in every process."""

from __future__ import annotations

import subprocess
import sys
import types

import fourbit_vllm


def test_another_vllm_is_warned_and_not_stopped(monkeypatch, caplog):
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm" or name.startswith("fourbit_vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    fourbit_vllm.register()
    assert "is for vLLM 0.32" in caplog.text


_PROGRAM = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
import fourbit_vllm
fourbit_vllm.register()
assert QUANTIZATION_METHODS.count("fourbit") == 1
ours = get_quantization_config("fourbit")
chosen = lambda entry, asked=None: ours.override_quantization_method(entry, asked)
bnb = {"quant_method": "bitsandbytes"}
assert chosen({**bnb, "load_in_4bit": True}) == "fourbit"
assert chosen({**bnb, "load_in_4bit": True}, "fourbit") == "fourbit"
assert chosen({**bnb, "load_in_4bit": True}, "bitsandbytes") is None
assert chosen({**bnb, "load_in_8bit": True, "load_in_4bit": False}) is None
assert chosen({"quant_method": "fourbit", "quant_type": "fp4"}) == "fourbit"
assert chosen({"quant_method": "gptq", "bits": 4}) is None
assert ours.from_config({**bnb, "load_in_4bit": True}).quant is None
assert ours.from_config({"quant_method": "fourbit", "quant_type": "fp4"}).quant.quant_type == "fp4"
class Gpt2: model_type = "gpt2"
try:
    ours().maybe_update_config("folder", Gpt2)
except ValueError as error:
    assert "gpt2" in str(error)
else:
    raise AssertionError("GPT-2 was not refused")
print("done")
"""


def test_vllm_finds_the_plugin_and_which_folders_are_its(needs_vllm):
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True)
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]
