"""The journal of an unfinished folder: what it is to become, and which tensors are in it already.

JSON, one value a line. The first is `{"format", "fingerprint", "replaces"}`; every other
`{"tensor": name, "sha256": {stored name: hexadecimal}}`, appended only when the tensor is on the disk. A line that
was torn by a crash ends the journal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fourbit.checkpoint import disk, snapshot
from fourbit.checkpoint.disk import atomic_file, flush_to_disk
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.snapshot import Snapshot

FORMAT = 2
JOURNAL_FILE = "journal.jsonl"


@dataclass(frozen=True)
class Records:
    """What a journal says.

    Attributes:
        fingerprint: of everything that determines the output.
        replaces: the destination as it was when the run began, which it may replace; None: nothing may be.
        hashes: for each tensor of the source that is written, the SHA-256 of each tensor it became.
    """

    fingerprint: dict[str, Any]
    replaces: Snapshot | None
    hashes: dict[str, dict[str, str]]


class Journal:
    """An open journal, to append to."""

    def __init__(self, folder: Path, records: Records, name: str = JOURNAL_FILE) -> None:
        """Write the journal anew, as far as it is known to be right, and open it."""
        path = folder / name
        with atomic_file(path) as stream:
            replaces = None if records.replaces is None else records.replaces.to_json()
            head = {"format": FORMAT, "fingerprint": records.fingerprint, "replaces": replaces}
            stream.write(_line(head))
            stream.writelines(_line({"tensor": name, "sha256": parts}) for name, parts in records.hashes.items())
        disk.sync_folder(folder)
        self._stream: IO[bytes] = open(path, "ab")  # noqa: SIM115
        self.hashes = dict(records.hashes)

    def append(self, hashes: Mapping[str, dict[str, str]]) -> None:
        """Note tensors that are on the disk, and wait until the note is."""
        if hashes:
            self._stream.write(b"".join(_line({"tensor": name, "sha256": parts}) for name, parts in hashes.items()))
            flush_to_disk(self._stream)
            self.hashes |= hashes

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read(folder: Path, name: str = JOURNAL_FILE) -> Records | None:
    """The journal in `folder`; None if there is none, so that nothing in the folder counts.

    Raises CheckpointError if it is of another version of fourbit, or cannot be read.
    """
    try:
        data = (folder / name).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error.strerror or error}") from error
    values = [_parsed(line) for line in data.split(b"\n")[:-1]]  # after the last newline is nothing, or a torn line
    head = values[0] if values else None
    if head is None or not isinstance(head.get("fingerprint"), dict):
        return None
    if head.get("format") != FORMAT:
        raise CheckpointError(f"{folder} was begun by another version of fourbit; --overwrite starts afresh")
    hashes: dict[str, dict[str, str]] = {}
    for value in values[1:]:
        if value is None or not isinstance(value.get("tensor"), str) or not isinstance(value.get("sha256"), dict):
            break
        hashes[value["tensor"]] = value["sha256"]
    return Records(head["fingerprint"], snapshot.from_json(head.get("replaces")), hashes)


def read_own(folder: Path, name: str = JOURNAL_FILE) -> Records | None:
    """`read`; None also for a journal that this version of fourbit does not understand."""
    try:
        return read(folder, name)
    except CheckpointError:
        return None


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
