"""transformers' Trainer with accelerate's FSDP2, under torchrun: as one process, saved, resumed, no bit changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import need

need("transformers", "accelerate", "peft")

from tests.plugins.test_tensor_parallel import llama  # noqa: E402

pytestmark = pytest.mark.long
PROGRAM = Path(__file__).with_name("fsdp_trainer.py")


def require_fsdp2():
    from accelerate import utils

    if not hasattr(utils, "fsdp2_prepare_model"):
        pytest.skip("this accelerate has no FSDP2")


def run(folder, name, *more, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(PROGRAM), str(folder), name, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if processes == 1:  # or the Trainer wraps the model in nn.DataParallel, with as many times the batch
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(folder / f"{name}.pt")


def check(devices, tmp_path):
    require_fsdp2()
    llama().save_pretrained(tmp_path / "plain")
    one = run(tmp_path, "one", *devices)
    assert len(one["losses"]) == 20 and one["losses"][-1] < one["losses"][0]
    for name, more in (("two", ()), ("resumed", ("--resume", "two"))):
        found = run(tmp_path, name, *more, *devices, processes=2)
        assert found["changed"] == one["changed"] == []
        torch.testing.assert_close(found["losses"], one["losses"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["adapters"], one["adapters"], rtol=1e-3, atol=1e-3)


def test_twenty_steps(tmp_path):
    check((), tmp_path)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants two GPUs")
def test_twenty_steps_on_two_gpus(tmp_path):
    check(("--device", "cuda"), tmp_path)


def test_deepspeed_zero3_is_refused(tmp_path, monkeypatch):
    import transformers as T
    from transformers.integrations import deepspeed

    from fourbit_transformers import FourbitConfig

    llama().save_pretrained(tmp_path)
    monkeypatch.setattr(deepspeed, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(NotImplementedError, match="DeepSpeed's ZeRO-3 is not supported .* FSDP2"):
        T.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FourbitConfig())
