"""An emulator of AMDGPU machine code, for tests: what hipRTC compiled runs here, instruction by instruction.

It answers whether the *instructions* of a code object compute the right thing, without an AMD GPU. It says
nothing about timing, occupancy, caches, or the order in which real hardware makes writes visible.

A launch runs its waves in batches, in numpy: a register is an array over (wave, lane), and one decoded instruction
acts on all waves that stand at it. Decoding is llvm-objdump's; what an instruction does is written here after AMD's
ISA documents. What the emulator does not know, it refuses.

What it checks beyond the results:

- An instruction, operand or modifier that is not known raises `UnknownInstruction`.
- Global memory is the registered buffers and nothing else; any access outside raises `MemoryFault`.
- LDS bytes have owners: what one wave wrote, another may touch only after a barrier, else `RaceError`; a read of
  bytes that nobody wrote raises `UninitializedRead`. A missing barrier shows whatever the order of waves.
- Registers start as garbage that depends on the launch's seed, so a result that depends on a register that was
  never written differs from the reference, and from run to run.
- A barrier that only some waves of a workgroup reach raises `BarrierError`.

The files: `disassembly` (text to instructions), `operands` (how they read and write registers), `scalar`,
`vector` and its neighbours (what they compute), `lds`, `memory`, `matrix`, `control`, `machine` (waves and their
scheduling), `launch` (registers and kernel arguments as the command processor sets them up), `standin` (a
libamdhip64 that launches here).
"""
