"""Runs linear_4bit once for each number of rows, for a profiler to look at; prints nothing itself.

    ncu --clock-control none --profile-from-start off --section SpeedOfLight --section WarpStateStats \\
        --section MemoryWorkloadAnalysis --section SchedulerStats --section Occupancy \\
        python -m peers.profile_cuda --shape 8192x8192 --rows 1,16,64

bfloat16, NF4, blocksize 64. Kernels are compiled before the profiler starts to listen.
"""

from __future__ import annotations

import argparse

import torch

import fourbit


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8192x8192", help="out x in")
    parser.add_argument("--rows", default="1,16,64")
    parser.add_argument("--double-quant", action="store_true")
    options = parser.parse_args()
    n, k = map(int, options.shape.split("x"))
    torch.manual_seed(0)
    w = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
    packed, state = fourbit.quantize_4bit(w, double_quant=options.double_quant)
    inputs = [torch.randn(int(m), k, dtype=torch.bfloat16, device="cuda") for m in options.rows.split(",")]
    for x in inputs:
        fourbit.linear_4bit(x, packed, state)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for x in inputs:
        w.mul_(1)  # larger than the second-level cache, so that the weight is read from memory
        fourbit.linear_4bit(x, packed, state)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
