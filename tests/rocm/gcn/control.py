"""Branches, barriers, the end of a program, and instructions without an effect that shows here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.rocm.gcn.disassembly import Instruction
from tests.rocm.gcn.errors import UnknownInstruction
from tests.rocm.gcn.waves import VCC, Waves

NO_EFFECT = {
    "s_nop",
    "s_waitcnt",
    "s_waitcnt_vscnt",
    "s_waitcnt_vmcnt",
    "s_waitcnt_lgkmcnt",
    "s_waitcnt_expcnt",
    "s_waitcnt_depctr",
    "s_wait_loadcnt",
    "s_wait_storecnt",
    "s_wait_kmcnt",
    "s_wait_dscnt",
    "s_wait_samplecnt",
    "s_wait_bvhcnt",
    "s_wait_expcnt",
    "s_wait_loadcnt_dscnt",
    "s_wait_storecnt_dscnt",
    "s_wait_alu",
    "s_wait_xcnt",
    "s_delay_alu",
    "s_clause",
    "s_inst_prefetch",
    "s_set_inst_prefetch_distance",
    "s_sleep",
    "s_setprio",
    "s_sendmsg",
    "s_icache_inv",
    "s_dcache_inv",
    "s_dcache_wb",
    "buffer_gl0_inv",
    "buffer_gl1_inv",
    "buffer_wbl2",
    "buffer_invl2",
    "buffer_inv",
    "buffer_wbinvl1",
    "buffer_wbinvl1_vol",
    "global_inv",
    "global_wb",
    "global_wbinv",
    "s_barrier_signal",  # the wait that follows it stands for the barrier
    "v_nop",
    "s_code_end",
}
"""Waits for counters (every access is complete at once here), caches, hints to the scheduler."""

ENDS = {"s_endpgm", "s_endpgm_saved"}
BARRIERS = {"s_barrier", "s_barrier_wait"}
TRAPS = {"s_trap", "s_sethalt"}
CONDITIONS: dict[str, Callable[[Waves], np.ndarray]] = {
    "s_cbranch_scc0": lambda waves: ~waves.scc,
    "s_cbranch_scc1": lambda waves: waves.scc,
    "s_cbranch_execz": lambda waves: ~waves.exec.any(axis=1),
    "s_cbranch_execnz": lambda waves: waves.exec.any(axis=1),
    "s_cbranch_vccz": lambda waves: ~waves.s[VCC : VCC + waves.words].any(axis=0),
    "s_cbranch_vccnz": lambda waves: waves.s[VCC : VCC + waves.words].any(axis=0),
    "s_branch": lambda waves: np.ones(waves.count, bool),
}


def ends_block(instruction: Instruction) -> bool:
    """Whether control may go elsewhere than to the next instruction, or waves may have to wait."""
    name = instruction.mnemonic
    return name in ENDS or name in BARRIERS or name in CONDITIONS or name in TRAPS


def branch_target(instruction: Instruction) -> int:
    """The address that a branch names: its operand counts words after it."""
    try:
        words = int(instruction.operands[0], 0)
    except (IndexError, ValueError) as error:
        raise UnknownInstruction(instruction.text) from error
    words -= (words & 0x8000) << 1
    return instruction.address + 4 + 4 * words
