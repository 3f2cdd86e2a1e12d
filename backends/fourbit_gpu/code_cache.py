"""A cache on disk for code that backends compile at run time, shared by every process of a user.

An entry is a file named by a hash of everything that its code depends on. Whoever misses takes the entry's
lock, looks again, and only then compiles, so that many processes starting at once compile once. Entries are
written to a temporary file and renamed, carry a checksum (a damaged one is compiled anew), and the least
recently used go when the folder has grown too large.

The folder is `jit` in FOURBIT_CACHE_DIR, else in the user's cache folder, and is private (0700), since what is
in it gets executed: no other user may write there or rename a folder above it (see `trust`). Where it cannot be
used, code is compiled in every process, and one warning says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fourbit.version import __version__
from fourbit_gpu import trust

if TYPE_CHECKING:
    from filelock import BaseFileLock

CACHE_VARIABLE = "FOURBIT_CACHE_DIR"
LIMIT_VARIABLE = "FOURBIT_JIT_CACHE_MB"
DEFAULT_LIMIT_MB = 256
LOCK_SECONDS = 120.0
"""A process that waited so long for another's compilation compiles for itself."""

STALE_SECONDS = 3600.0
"""Age at which a temporary file or an unused lock is taken to be left over."""

_MAGIC = b"fourbit-jit-1\n"
_SUFFIX = ".code"


class CacheWarning(RuntimeWarning):
    """The cache of compiled code cannot be used, or not fully; the message says why and what to do."""


def key(**parts: str | int | list[str] | dict[str, str]) -> str:
    """The name of an entry: a hash of `parts`, in any order, and of fourbit's version.

    The caller names all that its code depends on: source and headers, options, arch, compiler and version.
    """
    text = json.dumps({"fourbit": __version__, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def cached(name: str, build: Callable[[], bytes]) -> bytes:
    """The code under `name` (see `key`) from the user's cache, or from `build()`, then stored."""
    return default_cache().get(name, build)


def default_cache() -> DiskCache:
    """The cache that the environment asks for, read at each call: it is called when a kernel is first loaded."""
    root = os.environ.get(CACHE_VARIABLE)
    limit = os.environ.get(LIMIT_VARIABLE, "")
    identity = (root, limit)
    with _caches_lock:
        found = _caches.get(identity)
        if found is None:
            found = _caches[identity] = DiskCache(_folder(root), _limit_bytes(limit))
        return found


_caches: dict[tuple[str | None, str], DiskCache] = {}
_caches_lock = threading.Lock()


def _folder(root: str | None) -> Path | None:
    if root:
        return Path(root).expanduser() / "jit"
    from platformdirs import user_cache_path

    try:
        folder = user_cache_path("fourbit", appauthor=False) / "jit"
    except (RuntimeError, OSError):  # no home at all
        return None
    return folder if folder.is_absolute() else None  # without HOME it may be relative: not to be scattered about


def _limit_bytes(text: str) -> int:
    try:
        megabytes = int(text or DEFAULT_LIMIT_MB)
    except ValueError:
        megabytes = -1
    if megabytes < 0:
        raise ValueError(f"{LIMIT_VARIABLE} must be a number of megabytes, got {text!r}")
    return megabytes << 20


class DiskCache:
    """Compiled code in a folder.

    Args:
        folder: where; None caches nothing on disk.
        limit: bytes to which the folder is brought back when an entry is added.
    """

    def __init__(self, folder: Path | None, limit: int = DEFAULT_LIMIT_MB << 20) -> None:
        self.folder = folder
        self.limit = limit
        self._told = False
        if folder is None:
            self._tell("there is no home folder to keep it in")

    def get(self, name: str, build: Callable[[], bytes]) -> bytes:
        """The entry `name`, or what `build()` returns, stored under it. Errors of `build` pass through."""
        if not self._prepared():
            return build()
        code = self._load(name)
        if code is not None:
            return code
        lock = self._lock(name)
        try:
            if lock is not None:
                code = self._load(name)  # another process may have built it while this one waited
            if code is None:
                code = build()
                self._store(name, code)
            return code
        finally:
            if lock is not None:
                lock.release()

    # ---- the folder -----------------------------------------------------------------------------------------

    def _prepared(self) -> bool:
        """Whether the folder may be used, made if it is missing; looked at each time, as it may have changed."""
        if self.folder is None:
            return False
        try:
            for folder in (*reversed(self.folder.parents), self.folder):
                if not folder.exists():
                    with suppress(FileExistsError):
                        folder.mkdir(mode=0o700)
            trust.check_parents(self.folder)
            if os.name == "posix":
                os.close(trust.open_private(self.folder))
        except trust.Untrusted as error:
            self._tell(str(error))
            return False
        except OSError as error:
            self._tell(f"{self.folder} cannot be made: {error.strerror or error}")
            return False
        return True

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}{_SUFFIX}"

    def _tell(self, why: str) -> None:
        if self._told:
            return
        self._told = True
        message = (
            f"compiled kernels are not kept on disk, so each process compiles its own: {why}."
            f" Set {CACHE_VARIABLE} to a folder that this user, and no other, can write."
        )
        warnings.warn(message, CacheWarning, stacklevel=4)

    # ---- entries --------------------------------------------------------------------------------------------

    def _load(self, name: str) -> bytes | None:
        """The entry's code, or None if it is missing or damaged."""
        try:
            content = self._read(f"{name}{_SUFFIX}")
        except (OSError, trust.Untrusted):
            return None
        head = len(_MAGIC) + 32
        code = content[head:]
        if content[: len(_MAGIC)] != _MAGIC or hashlib.sha256(code).digest() != content[len(_MAGIC) : head]:
            return None
        with suppress(OSError):
            os.utime(self._path(name))  # used now: eviction goes by this time
        return code

    def _read(self, entry: str) -> bytes:
        """The file's content, if it is this user's or root's, in a folder that is: by descriptors, not by path."""
        assert self.folder is not None
        if os.name != "posix":
            return (self.folder / entry).read_bytes()
        folder = trust.open_private(self.folder)
        try:
            return trust.read_own(entry, folder)
        finally:
            os.close(folder)

    def _store(self, name: str, code: bytes) -> None:
        """Write an entry so that no reader ever sees a part of it; then keep within the limit."""
        assert self.folder is not None
        temporary: str | None = None
        try:
            handle, temporary = tempfile.mkstemp(prefix=f".{name[:16]}.", suffix=".tmp", dir=self.folder)  # mode 0600
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(code).digest() + code)
            os.replace(temporary, self._path(name))
        except OSError as error:
            if temporary is not None:
                with suppress(OSError):
                    os.unlink(temporary)
            self._tell(f"{self.folder} cannot be written: {error.strerror or error}")
            return
        self._evict(keep=name)

    def _lock(self, name: str) -> BaseFileLock | None:
        """The entry's lock, held; None where files cannot be locked or the holder takes too long."""
        from filelock import FileLock, Timeout

        assert self.folder is not None
        lock = FileLock(str(self.folder / f"{name}.lock"), timeout=LOCK_SECONDS, mode=0o600)
        try:
            lock.acquire(poll_interval=0.01)
        except (Timeout, OSError, NotImplementedError):
            return None  # two may build the same then, which only costs time
        return lock

    def _evict(self, keep: str) -> None:
        """Remove the least recently used entries over the limit, and what crashed processes left behind."""
        assert self.folder is not None
        entries, now = [], time.time()
        try:
            found = list(os.scandir(self.folder))
        except OSError:
            return
        for entry in found:
            with suppress(OSError):
                info = entry.stat(follow_symlinks=False)
                if entry.name.endswith(_SUFFIX):
                    entries.append((info.st_mtime, info.st_size, entry.path))
                elif entry.name.endswith((".tmp", ".lock")) and now - info.st_mtime > STALE_SECONDS:
                    # a lock that is held all the same costs one compilation too many, not more
                    os.unlink(entry.path)
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit:
                break
            if path == str(self._path(keep)):
                continue
            with suppress(OSError):
                os.unlink(path)
                total -= size
