"""Instructions per weight in the inner loops of the 4-bit products: `python -m tests.rocm.gcn.count [ARCH …]`.

The numbers of fourbit_rocm/README.md. An inner loop is a backward branch with no other inside; of a kernel's, the one
with the most reads of the decoding table is the one that runs over k.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator

import torch

from fourbit_gpu.spec import KernelSpec
from fourbit_rocm import linear
from fourbit_rocm.targets import Target, target
from tests.rocm.gcn import control, tiers
from tests.rocm.gcn.disassembly import Instruction, disassemble

CLASSES = {"v_mfma": "matrix", "v_": "vector", "ds_": "LDS", "global_": "memory", "s_": "scalar"}


def kind_of(instruction: Instruction) -> str:
    """The unit that executes an instruction."""
    return next((name for prefix, name in CLASSES.items() if instruction.mnemonic.startswith(prefix)), "other")


def inner_loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """The bodies of loops without a loop inside."""
    loops = []
    for instruction in code:
        if instruction.mnemonic in control.CONDITIONS and control.branch_target(instruction) <= instruction.address:
            loops.append((control.branch_target(instruction), instruction.address))
    for first, last in loops:
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in loops):
            yield [each for each in code if first <= each.address <= last]


def per_weight(spec: KernelSpec, where: Target, weights: int) -> dict[str, float]:
    """Instructions of each kind per weight; a lane decodes `weights` in one turn of the loop."""
    code = disassemble(tiers.tier_for(where.arch).image(spec, where), where.arch)[spec.name]
    body = max(inner_loops(code), key=lambda loop: sum(each.mnemonic.startswith("ds_") for each in loop))
    counts = Counter(kind_of(each) for each in body if each.mnemonic not in control.NO_EFFECT)
    return {kind: count / weights for kind, count in sorted(counts.items())}


def main(archs: list[str]) -> None:
    """Print a line for each kernel."""
    for arch in archs:
        where = target(arch)
        cases = [(linear.vector_spec(torch.bfloat16, False, m), 8 * (4 if m <= 4 else 2)) for m in (1, 4, 16)]
        if where.has_mfma:
            cases.insert(0, (linear.mfma_spec(torch.bfloat16, False), 16))
        for spec, weights in cases:
            found = ", ".join(f"{kind} {count:.2f}" for kind, count in per_weight(spec, where, weights).items())
            print(f"{arch} {spec.label()}: {found}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["gfx942", "gfx1100"])
