"""DeviceProps: what launch plans and kernels' choices may depend on, as plain data that a test can make up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceProps:
    """One GPU.

    Attributes:
        index: torch's device index.
        name: as the driver reports it.
        arch: compute capability times ten on CUDA (90 for 9.0).
        sm_count: multiprocessors (of AMD's: compute units on CDNA, workgroup processors on RDNA).
        l2_bytes: second-level cache.
        shared_per_block: shared memory that one block can have if its kernel opts in, bytes.
        warp_size: lanes of a warp (wave).
        bandwidth: theoretical memory bandwidth, GB/s; 0 where the driver does not tell.
    """

    index: int
    name: str
    arch: int
    sm_count: int
    l2_bytes: int
    shared_per_block: int
    warp_size: int = 32
    bandwidth: float = 0.0
