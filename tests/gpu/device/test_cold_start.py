"""First use: many processes with an empty cache compile each kernel once; a newer arch goes through PTX."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from fourbit.testing.oracle import assert_same_bits, make_weight

PROGRAM = """
import sys, torch, fourbit
from fourbit_cuda import compiler
build = compiler.compile_source
def counted(spec, *rest):
    with open(sys.argv[1], "a") as file:
        file.write(spec.label() + "\\n")
    return build(spec, *rest)
compiler.compile_source = counted
w = torch.linspace(-1, 1, 4096, device="cuda")
packed, state = fourbit.quantize_4bit(w)
print(float((fourbit.dequantize_4bit(packed, state) - w).abs().max()) < 0.16)
"""


def test_sixteen_processes_compile_once(device, tmp_path):
    log = tmp_path / "compiled"
    env = os.environ | {"FOURBIT_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", PROGRAM, str(log)]
    started = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(16)
    ]
    for process in started:
        out, err = process.communicate(timeout=300)
        assert out.strip() == "True", out + err
    lines = log.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 2, lines


def test_an_arch_newer_than_nvrtc(device, monkeypatch, tmp_path):
    """PTX for the newest arch that NVRTC knows, finished by the driver: the same bits."""
    from fourbit_cuda import libraries, targets
    from fourbit_cuda.driver import CudaLauncher
    from fourbit_gpu import elementwise

    monkeypatch.setenv("FOURBIT_CACHE_DIR", str(tmp_path))
    own = 10 * torch.cuda.get_device_capability(device)[0] + torch.cuda.get_device_capability(device)[1]
    known = tuple(arch for arch in libraries.known_archs() if arch < own)
    if not known:
        known = (own,)
    monkeypatch.setattr(libraries, "known_archs", lambda: known)
    fresh = CudaLauncher(device.index)
    weight = make_weight(100, 77, double_quant=True)
    out = elementwise.dequantize(fresh, weight.weight(device), weight.shape, torch.bfloat16)
    assert_same_bits(out, weight.dense(torch.bfloat16), "through PTX")
    assert targets.target(own).is_ptx == (known != (own,))
