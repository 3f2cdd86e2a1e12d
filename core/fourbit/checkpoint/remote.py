"""A source in object storage, or wherever else fsspec reads: its small files fetched, its weights read where they lie.

What everything else sees is a folder on this machine: of a weight file it has the header, and then a hole of the
file's size. Only the bytes of a tensor that is converted are fetched, once, when it is its turn; they are never on the
disk. Nothing is written there: see `urls.refuse_destination`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fourbit.checkpoint import untrusted
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.tensors import TensorInfo
from fourbit.checkpoint.urls import as_url
from fourbit.checkpoint.weight_files import MAX_OTHER_BYTES, holds_weights

HEADER_BYTES = 100_000_000
"""Longest header that safetensors reads."""
MOST_FILES = 100_000
"""That a folder may have: a URL that names a whole bucket by mistake is not gone through."""
RANGE_BYTES = 1 << 23
RANGES = 8
"""So many ranges are asked for at once, which those file systems that can do fetch at the same time."""

_IDENTITY = ("ETag", "etag", "md5Hash", "crc32c", "generation", "blob_id", "content_md5")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""What file systems say of a file by which another content shows."""


class Remote:
    """A folder at a URL, and what stands for it on this machine.

    Args:
        url: of a folder.
        shadow: an empty folder on this machine.

    Raises CheckpointError if fsspec, or what it needs for such a URL, is not installed, and for what cannot be read.
    """

    def __init__(self, url: str, shadow: Path) -> None:
        self.url, self.shadow = url, shadow
        self._files: dict[str, dict[str, Any]] = {}
        self._holes: set[str] = set()
        self._filesystem, self._root = self._opened()
        self._files = self._listed()
        for name, info in self._files.items():
            self._make(name, info)

    def _opened(self) -> tuple[Any, str]:
        try:
            import fsspec  # type: ignore[import-untyped]
        except ImportError as error:
            raise CheckpointError(f"{self.url} needs fsspec, which is not installed: pip install fsspec") from error
        with self._reported():
            return fsspec.core.url_to_fs(self.url)  # type: ignore[no-any-return]

    @contextmanager
    def _reported(self, name: str = "") -> Iterator[None]:
        """What a file system raises, of whatever kind, in one line that names the file."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            where = f"{self.url.rstrip('/')}/{name}" if name else self.url
            said = " ".join(str(error).split()) or "no reason given"
            raise CheckpointError(f"{where} cannot be read: {type(error).__name__}: {said}") from error

    def _listed(self) -> dict[str, dict[str, Any]]:
        """What is there now, by relative name, hidden files left out."""
        root = self._root.rstrip("/")
        found: dict[str, dict[str, Any]] = {}
        with self._reported():
            self._filesystem.invalidate_cache()
            if self._filesystem.isfile(root):
                raise CheckpointError(f"{self.url} is a file; name the folder that it is in")
            for path, info in self._filesystem.find(root, detail=True).items():
                name = str(path)[len(root) :].lstrip("/")
                parts = name.split("/")
                if not str(path).startswith(root + "/") or not name:
                    continue  # the folder itself, as some have it
                if not all(map(untrusted.is_plain_name, parts)):
                    raise CheckpointError(f"{self.url} has the name {name[:80]!r}, which this machine cannot have")
                if any(part.startswith(".") for part in parts):
                    continue
                found[name] = info
                if len(found) > MOST_FILES:
                    raise CheckpointError(f"{self.url} has more than {MOST_FILES:,} files: name a model's folder")
        if not found:
            raise CheckpointError(f"{self.url} does not exist, or is empty")
        return dict(sorted(found.items()))

    def _make(self, name: str, info: dict[str, Any]) -> None:
        """A file of the shadow: the whole, or what its reader looks at and a hole."""
        path, size = self.shadow / name, int(info.get("size") or 0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if (name.endswith(".json") or not holds_weights(name)) and size <= MAX_OTHER_BYTES:
                self._fetch(name)
                return
            head = b""
            if name.endswith(".safetensors"):
                head = self._range(name, 0, min(8, size))
                head += self._range(name, 8, min(8 + int.from_bytes(head, "little"), 8 + HEADER_BYTES, size))
            with open(path, "wb") as stream:
                stream.write(head)
                stream.truncate(size)
        except OSError as error:
            raise CheckpointError(f"{path}, for {self.url}: {error.strerror or error}") from error
        self._holes.add(name)

    def _fetch(self, name: str) -> None:
        with self._reported(name):
            self._filesystem.get_file(f"{self._root.rstrip('/')}/{name}", str(self.shadow / name))
        self._holes.discard(name)

    def _range(self, name: str, begin: int, end: int) -> bytes:
        if end <= begin:
            return b""
        with self._reported(name):
            data = bytes(self._filesystem.cat_file(f"{self._root.rstrip('/')}/{name}", start=begin, end=end))
            if len(data) != end - begin:
                raise ValueError(f"it gave {len(data)} bytes of {end - begin}")
            return data

    def fetch_whole(self, names: Iterable[str]) -> None:
        """Fetch files of weights that are carried over as they are. Raises CheckpointError."""
        for name in names:
            if name in self._holes:
                self._fetch(name)

    def read_into(self, info: TensorInfo, target: memoryview) -> None:
        """A tensor's bytes, from where they lie. Raises CheckpointError."""
        name = info.file.relative_to(self.shadow).as_posix()
        path = f"{self._root.rstrip('/')}/{name}"
        with self._reported(name):
            for first in range(0, info.nbytes, RANGE_BYTES * RANGES):
                last = min(first + RANGE_BYTES * RANGES, info.nbytes)
                begins = list(range(first, last, RANGE_BYTES))
                ends = [min(begin + RANGE_BYTES, last) for begin in begins]
                offsets = ([info.offset + at for at in places] for places in (begins, ends))
                for begin, end, data in zip(
                    begins,
                    ends,
                    self._filesystem.cat_ranges([path] * len(begins), *offsets, on_error="raise"),
                    strict=True,
                ):
                    if isinstance(data, BaseException):  # of some file systems
                        raise data
                    if len(data) != end - begin:
                        raise ValueError(f"it gave {len(data)} bytes of {end - begin}; has it become shorter?")
                    target[begin:end] = data

    def look_again(self) -> None:
        """List what is there once more, for `identity`. Raises CheckpointError."""
        self._files = self._listed()

    def identity(self, name: str) -> dict[str, Any]:
        """What the file system says of a file by which another content shows, as JSON values; {} if it is gone."""
        info = self._files.get(name)
        if info is None:
            return {}
        strong = {key: str(info[key]) for key in _IDENTITY if info.get(key) is not None}
        times = {key: str(info[key]) for key in _TIMES if info.get(key) is not None}
        return {"bytes": info.get("size"), **(strong or times)}


@contextmanager
def opened(src: str | os.PathLike[str]) -> Iterator[tuple[Path, Remote | None]]:
    """The folder to open, and what reads its weights if it stands for a URL; errors name that."""
    url = as_url(src)
    if url is None:
        yield Path(src), None
        return
    with tempfile.TemporaryDirectory(prefix="fourbit-", ignore_cleanup_errors=True) as name:
        shadow = Path(name).resolve()
        try:
            yield shadow, Remote(url, shadow)
        except CheckpointError as error:
            raise type(error)(str(error).replace(str(shadow), url.rstrip("/"))) from error
