"""Makes a model folder of 8 GB, runs `fourbit quantize` on it, and prints its peak memory and its time.

    python -m peers.checkpoint [--size-gb 8] [--folder PLACE]

bfloat16, several files, one tensor an eighth of the whole. Beside it, in the same run and process order, the plain
copy: reading the source's bytes and writing as many as the result has, flushed to the disk. The exit status is 1 if
the peak is over its bound, three times the largest tensor plus 500 MB. POSIX only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

FILES = 4
WIDTH = 4096
CHUNK = 1 << 22


def make_source(folder: Path, nbytes: int) -> int:
    """A folder of about `nbytes`; returns the bytes of its largest tensor."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    rows = max(nbytes // 8 // WIDTH // 2, 1)
    row = torch.randn(64, WIDTH).bfloat16() * 0.02
    weight_map: dict[str, str] = {}
    for i in range(FILES):
        # of the first file's quarter half is one tensor; the rest are eight in a file
        shapes = {f"model.layers.{i}.{j}_proj.weight": rows // 4 for j in range(8)}
        if i == 0:
            shapes = {"model.layers.0.large_proj.weight": rows, **{k: rows // 8 for k in shapes}}
        tensors = {name: row.repeat(-(-count // 64), 1)[:count].clone() for name, count in shapes.items()}
        tensors[f"model.layers.{i}.norm.weight"] = torch.ones(WIDTH).bfloat16()
        file = f"model-{i + 1:05d}-of-{FILES:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": WIDTH}))
    os.sync()
    return rows * WIDTH * 2


def size_of(folder: Path) -> int:
    """Bytes of all weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def plain_copy(src: Path, target: Path, nbytes: int) -> float:
    """Seconds to read all of `src` and to write `nbytes`, flushed."""
    begin = time.perf_counter()
    buffer = bytearray(CHUNK)
    left = nbytes
    with open(target, "wb", buffering=0) as written:
        for path in sorted(src.glob("*.safetensors")):
            with open(path, "rb", buffering=0) as read:
                while count := read.readinto(buffer):
                    part = min(left, count)
                    written.write(memoryview(buffer)[:part])
                    left -= part
        os.fsync(written.fileno())
    seconds = time.perf_counter() - begin
    target.unlink()
    return seconds


def forget(folder: Path) -> None:
    """Drop the folder's files from the system's cache, so that reading them reads the disk."""
    if hasattr(os, "posix_fadvise"):
        for path in folder.glob("*.safetensors"):
            with open(path, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(command: list[str]) -> tuple[float, int]:
    """Run a command: its seconds, and its peak resident bytes, as /usr/bin/time has them."""
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)} ended with status {child.returncode}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Make, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-gb", type=float, default=8.0)
    parser.add_argument("--folder", type=Path, help="where to put it; default the system's temporary folder")
    parser.add_argument("--double-quant", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        src, dst = work / "src", work / "dst"
        # In a process of its own: Linux counts a parent's memory at the fork as its child's peak.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            largest = pool.submit(make_source, src, int(options.size_gb * 1e9)).result()
        double = ["--double-quant"] if options.double_quant else []
        forget(src)
        seconds, peak = measured([sys.executable, "-m", "fourbit.cli", "quantize", str(src), str(dst), *double])
        verify_seconds, verify_peak = measured([sys.executable, "-m", "fourbit.cli", "verify", str(dst)])
        before, after = size_of(src), size_of(dst)
        forget(src)
        copy = plain_copy(src, work / "copy", after)
    bound = 3 * largest + 500_000_000
    ok = peak <= bound
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()},")
    print(f"torch {version('torch')}, fourbit {version('fourbit')}")
    print(f"source: {before:,} bytes in {FILES} files, largest tensor {largest:,} bytes; result: {after:,} bytes")
    print(f"peak resident: {peak:,} bytes, bound {bound:,}: {'within' if ok else 'OVER'}")
    print(f"quantize: {seconds:.1f} s; reading and writing the same bytes: {copy:.1f} s; ratio {seconds / copy:.2f}")
    print(f"verify: {verify_seconds:.1f} s, peak {verify_peak:,} bytes")
    sys.exit(not ok)


if __name__ == "__main__":
    main()
