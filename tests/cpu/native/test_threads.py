"""ThreadSanitizer over ops that are large enough to be split, on each instruction set."""

from __future__ import annotations

import pytest
import torch

from fourbit.testing.inputs import normal
from fourbit.testing.oracle import make_weight
from tests.cpu.native.backend import NativeServerBackend
from tests.cpu.native.builds import VARIANTS
from tests.cpu.native.client import Server

pytestmark = pytest.mark.long  # a build of its own


@pytest.mark.parametrize("isa", [isa for build, isa in VARIANTS if build == "sanitized"])
def test_no_races(server_command, isa):
    with Server(server_command("threads", isa), isa) as server:
        backend = NativeServerBackend(server)
        weight = make_weight(520, 1088, double_quant=True).weight()
        table = weight.nested_code
        for dtype in (torch.float32, torch.bfloat16):
            for rows in (1, 3, 40):
                backend.linear_4bit(normal(rows, 1088).to(dtype), weight, 520)
                backend.linear_4bit_grad(normal(rows, 520).to(dtype), weight, 1088)
            w = backend.dequantize_4bit(weight, (520, 1088), dtype)
            backend.quantize_4bit(w, weight.code, 64, False)
        codes, absmax = backend.quantize_blockwise(normal(1 << 18), table, 256)
        backend.dequantize_blockwise(codes, absmax, table, 256, torch.float16)
        backend.embedding_4bit(torch.arange(520), weight, 520, 1088, torch.bfloat16)
        assert server.close() == 0


def test_a_race_is_found(server_command):
    with Server(server_command("threads", "scalar"), "scalar") as server:
        server.call("probe_race", (torch.int32, 1))
        assert server.close() != 0
