"""What the emulator raises. Each names the instruction and its address in the code object."""

from __future__ import annotations


class EmulatorError(Exception):
    """Anything that would be a fault on hardware, or that the emulator cannot vouch for."""


class UnknownInstruction(EmulatorError):
    """An instruction, operand or modifier without a definition here: it is never skipped."""


class MemoryFault(EmulatorError):
    """An access to global memory outside the registered buffers, or to LDS outside the workgroup's."""


class RaceError(EmulatorError):
    """Two waves of a workgroup touch the same LDS bytes with no barrier between, at least one writing."""


class UninitializedRead(EmulatorError):
    """A read of LDS bytes that the workgroup has not written."""


class BarrierError(EmulatorError):
    """A barrier that waves of a workgroup wait at while others have ended or wait at another."""


class KernelTrap(EmulatorError):
    """The kernel stopped itself: an assertion of its own failed."""
