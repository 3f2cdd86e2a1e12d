"""Matrix instructions (MFMA) of the CDNA targets.

For D = A·B + C of m x n x k, with `width` = 64 // m lanes groups: lane l holds row (or column) l % m of A (or B) and
k / groups consecutive values of k from (l // m) * k / groups. Of D and C, register v of lane l is column l % n and row
8 * (v // 4) + 4 * (l // n) + v % 4 (m = 32), or 4 * (l // n) + v (m = 16).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.rocm.gcn.disassembly import Instruction
from tests.rocm.gcn.errors import UnknownInstruction
from tests.rocm.gcn.operands import constant, parse_register, register
from tests.rocm.gcn.vector import canonical, check_modifiers
from tests.rocm.gcn.waves import Waves

NAME = re.compile(r"^v_mfma_f32_(?P<m>16|32)x(?P=m)x(?P<k>\d+)_?(?P<type>bf16|f16)(?P<one_k>_1k)?$")
FLUSHING_TARGETS = ("gfx90a",)
"""MI200 flushes denormal float16 and bfloat16 inputs of MFMA to zero (AMD's and PyTorch's numerical notes)."""


def _values(waves: Waves, file: str, index: int, registers: int, kind: str, flush: bool) -> np.ndarray:
    """16-bit operands as float64 [wave, lane, value]."""
    words = np.stack([getattr(waves, file)[index + i] for i in range(registers)], axis=-1)
    halves = np.ascontiguousarray(words).view(np.uint16)
    if kind == "f16":
        values = halves.view(np.float16).astype(np.float64)
        smallest = 2.0**-14
    else:
        values = (halves.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
        smallest = 2.0**-126
    return np.where(np.abs(values) < smallest, 0.0, values) if flush else values


def build(instruction: Instruction, target: str) -> Callable[[Waves], None]:
    """An MFMA with 16-bit inputs and float32 accumulators as a function of the waves."""
    match = NAME.match(canonical(instruction.mnemonic))
    if match is None:
        raise UnknownInstruction(instruction.text)
    check_modifiers(instruction, set())
    m, k, kind = int(match["m"]), int(match["k"]), match["type"]
    groups = 64 // m
    per_lane = k // groups
    registers, outputs = per_lane // 2, m * m // 64
    destination, a, b = (register(text) for text in instruction.operands[:3])
    c = parse_register(instruction.operands[3])
    if per_lane not in (4, 8) or a.count != registers or b.count != registers or destination.count != outputs:
        raise UnknownInstruction(instruction.text)
    start = np.uint32(constant(instruction.operands[3], 32) if c is None else 0).view(np.float32)
    flush = target in FLUSHING_TARGETS
    lane = np.arange(64)
    row = np.array([[8 * (v // 4) + 4 * (x // m) + v % 4 if m == 32 else 4 * (x // m) + v for v in range(outputs)]
                    for x in lane])  # fmt: skip

    def matrix(waves: Waves, operand: object) -> np.ndarray:
        values = _values(waves, operand.file, operand.index, registers, kind, flush)
        return values.reshape(waves.count, groups, m, per_lane).transpose(0, 2, 1, 3).reshape(waves.count, m, k)

    def run(waves: Waves) -> None:
        if not waves.exec[waves.active].all():
            raise UnknownInstruction(f"{instruction.text} with lanes switched off")
        product = matrix(waves, a) @ matrix(waves, b).transpose(0, 2, 1)
        terms = product[:, row, lane[:, None] % m]  # [wave, lane, register]
        if c is None:
            before = np.full(terms.shape, start, np.float32)
        else:
            before = np.stack([getattr(waves, c.file)[c.index + v] for v in range(outputs)], -1).view(np.float32)
        total = (terms + before).astype(np.float32)
        file = getattr(waves, destination.file)
        for v in range(outputs):
            np.copyto(file[destination.index + v], total[..., v].view(np.uint32), where=waves.active[:, None])

    return run
