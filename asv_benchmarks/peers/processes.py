"""What several processes gain: `torchrun --nproc-per-node N -m fourbit quantize` on one folder, for several N.

    python -m peers.processes [--counts 1 2 4 8] [--size-gb 8] [--folder PLACE] [--device cuda] [--kill]

The source of peers.checkpoint, in more and smaller files. For each N: seconds, those that a source of a few bytes takes
(starting N processes, which import torch), bytes of the source a second of the rest, the peak memory of each process,
and whether every byte is that of one process. With --kill one process of the last N is killed
halfway, and the seconds until the others have ended and the seconds of the resumed run are printed. Each run has
one thread a process (what torchrun sets), and reads a source that is not in the system's cache where --forget is
given. The exit status is 1 if bytes differ, or a peak is over its bound, three times the largest tensor plus 500 MB
(on a GPU plus 2 GB, what CUDA takes). Linux only.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from fourbit.checkpoint.destination import unfinished_folder
from peers.checkpoint import forget, make_source, size_of

POLL_SECONDS = 0.05


def command_of(src: Path, dst: Path, count: int, *options: str) -> list[str]:
    """The command line."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [*launcher, "-m", "fourbit", "quantize", str(src), str(dst), *options]


def children(pid: int) -> list[int]:
    """A process's children."""
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def peak(pid: int) -> int:
    """A process's peak resident bytes so far; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


class Watch:
    """The peaks of all children of a process, while it runs."""

    def __init__(self, pid: int) -> None:
        self.peaks: dict[int, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(pid,), daemon=True)
        self._thread.start()

    def _watch(self, pid: int) -> None:
        while not self._over.wait(POLL_SECONDS):
            for child in children(pid):
                self.peaks[child] = max(self.peaks.get(child, 0), peak(child))

    def stop(self) -> int:
        """The highest peak."""
        self._over.set()
        self._thread.join()
        return max(self.peaks.values(), default=0)


def measured(command: list[str]) -> tuple[float, int]:
    """Seconds, and the highest peak of a process that it starts."""
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    watch = Watch(child.pid)
    status = child.wait()
    if status:
        sys.exit(f"{' '.join(command)} ended with status {status}")
    return time.perf_counter() - begin, watch.stop()


def same(a: Path, b: Path) -> bool:
    """Whether two folders have the same files with the same bytes."""
    names = {path.relative_to(a) for path in a.rglob("*") if path.is_file()}
    others = {path.relative_to(b) for path in b.rglob("*") if path.is_file()}
    return names == others and all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


def killed(src: Path, dst: Path, count: int, options: list[str], seconds: float) -> tuple[float, float]:
    """Kill the process of the highest rank halfway: seconds until all have ended, and of the resumed run."""
    child = subprocess.Popen(
        command_of(src, dst, count, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(seconds)
    parts = unfinished_folder(dst) / "parts"
    while child.poll() is None and not any(parts.glob("*.part")):  # of a small source starting takes the most
        time.sleep(POLL_SECONDS)
    pids = children(child.pid)
    if len(pids) < count:
        sys.exit("the run was over before one of its processes could be killed: want a larger --size-gb")
    os.kill(pids[-1], signal.SIGKILL)
    begin = time.perf_counter()
    child.wait()
    ended = time.perf_counter() - begin
    return ended, measured(command_of(src, dst, count, *options, "--resume"))[0]


def main() -> None:
    """Make, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size-gb", type=float, default=8.0)
    parser.add_argument("--folder", type=Path, help="where to put it; default the system's temporary folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-shard-size", default="1GB")
    parser.add_argument("--forget", action="store_true", help="read the source from the disk, not the system's cache")
    parser.add_argument("--kill", action="store_true")
    given = parser.parse_args()
    options = ["--device", given.device, "--max-shard-size", given.max_shard_size]
    ok = True
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        work = Path(name)
        src, tiny = work / "src", work / "tiny"
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            largest = pool.submit(make_source, src, int(given.size_gb * 1e9)).result()
            pool.submit(make_source, tiny, 0).result()
        before = size_of(src)
        bound = 3 * largest + (500_000_000 if given.device == "cpu" else 2_500_000_000)
        print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, {given.device},")
        print(f"Python {platform.python_version()}, torch {version('torch')}, fourbit {version('fourbit')}")
        print(f"source: {before:,} bytes, largest tensor {largest:,}; bound of each process's memory: {bound:,}")
        head = f"{'processes':>9}  {'seconds':>8}  {'start':>6}  {'GB/s of rest':>12}"
        print(f"{head}  {'faster':>6}  {'peak of one':>14}  bytes")
        first, reference = 0.0, work / "dst0"
        for i, count in enumerate(given.counts):
            dst = work / f"dst{i}"
            if given.forget:
                forget(src)
            seconds, high = measured(command_of(src, dst, count, *options))
            start, _ = measured(command_of(tiny, work / f"tiny{i}", count, *options))
            rest = max(seconds - start, 1e-3)
            first = first or rest
            equal = same(reference, dst)
            ok &= equal and high <= bound
            said = "the same" if equal else "DIFFERENT"
            print(
                f"{count:>9}  {seconds:>8.1f}  {start:>6.1f}  {before / rest / 1e9:>12.3f}  {first / rest:>6.2f}"
                f"  {high:>14,}  {said}",
                flush=True,
            )
            if given.kill and i == len(given.counts) - 1 and count > 1:
                again = work / "again"
                ended, resumed = killed(src, again, count, options, seconds / 2)
                equal = same(dst, again)
                ok &= equal
                print(
                    f"one of {count} killed after {seconds / 2:.1f} s: the others ended within {ended:.1f} s;"
                    f" resumed in {resumed:.1f} s, bytes {'the same' if equal else 'DIFFERENT'}"
                )
            if i:
                shutil.rmtree(dst)
    sys.exit(not ok)


if __name__ == "__main__":
    main()
