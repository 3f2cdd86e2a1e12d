"""What stops a run that hangs or takes memory without end, and what tells whether anything was written."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

SECONDS = 30
"""A case that takes longer ends the process, with the stacks of all threads in its note."""

ADDRESS_SPACE = 1 << 30
"""Bytes that may be reserved beyond what the process has: threads' stacks and the allocator's arenas."""

RESIDENT = 200_000_000
"""Bytes by which the process may grow over thousands of cases. The largest file has 100 kB."""


@contextmanager
def limited_memory() -> Iterator[None]:
    """Allocations beyond the limits fail; growth within them is measured. Does nothing where it cannot."""
    if resource is None or not Path("/proc/self/statm").exists():
        yield
        return
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    assert grown < RESIDENT, f"{grown:,} bytes more in memory than before"


@contextmanager
def no_hang(note: Path, what: str) -> Iterator[None]:
    """Ends the process after SECONDS; `note` has the case and the stacks of all threads then."""
    with open(note, "w", encoding="utf-8", errors="replace") as stream:
        stream.write(what + "\n")
        stream.flush()
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=stream)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a folder: mode, size and time of the last change; links are not followed."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            status = os.lstat(path)
            size = 0 if os.path.isdir(path) else status.st_size
            changed = 0 if os.path.isdir(path) else status.st_mtime_ns
            found[path] = (status.st_mode, size, changed)
    return found
