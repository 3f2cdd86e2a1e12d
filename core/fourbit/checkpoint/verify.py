"""Whether a folder is what its manifest says, and whether it agrees with itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourbit.checkpoint import destination, journal, manifest, staging
from fourbit.checkpoint.compound import Compound
from fourbit.checkpoint.disk import hash_of
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.reader import Checkpoint
from fourbit.checkpoint.source import resolved
from fourbit.checkpoint.weight_files import MANIFEST_FILE
from fourbit.state import dtype_name

_UNREAD = re.compile(r".*\.(?:md|png|jpe?g|gif|svg|pdf|log)|(?:LICEN[SC]E|NOTICE|COPYING)(?:\.txt)?", re.IGNORECASE)
"""Names of files that no loader of models reads or runs."""


@dataclass(frozen=True)
class Verification:
    """What `verify_checkpoint` found.

    Attributes:
        path: of the folder or file.
        manifest: whether it has one; without it no hash can be compared.
        finished: False for an unfinished folder.
        tensors, quantized: as stored, and how many weights are in 4 bits.
        nbytes: of all tensors.
        faults: one line for each.
        notices: files that the manifest does not know, and that no loader of models reads or runs; one line for each.
    """

    path: Path
    manifest: bool
    finished: bool
    tensors: int
    quantized: int
    nbytes: int
    faults: tuple[str, ...]
    notices: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "manifest": self.manifest,
            "finished": self.finished,
            "tensors": self.tensors,
            "quantized": self.quantized,
            "bytes": self.nbytes,
            "faults": list(self.faults),
            "notices": list(self.notices),
        }


def verify_checkpoint(path: str | Path) -> Verification:
    """Compare a folder (or one .safetensors file) with its manifest and with its own metadata; every byte is read.

    What is wrong with it comes back as faults; nothing is raised for that.
    """
    try:
        folder = resolved(path)
    except CheckpointError as error:
        return Verification(Path(path), False, True, 0, 0, 0, (str(error),))
    left = destination.unfinished_folder(folder)
    if staging.is_unfinished(folder) or (not folder.exists() and left.is_dir()):
        what = folder if staging.is_unfinished(folder) else left
        return Verification(folder, False, False, 0, 0, 0, (_unfinished(what),))
    faults: list[str] = []
    notices: list[str] = []
    listing: dict[str, Any] | None = None
    try:
        listing = manifest.read(folder)
    except CheckpointError as error:
        faults.append(str(error))
    has_manifest = listing is not None or bool(faults)
    try:
        with Compound(folder) as opened:
            for member in opened.members.values():
                faults += consistency(member.checkpoint)
            facts = (len(opened.entries), len(opened.quantized()), opened.nbytes)
            if listing is not None:
                faults += against_manifest(folder, listing, opened)
                notices += unknown_files(folder, listing, opened)[1]
    except CheckpointError as error:
        return Verification(folder, has_manifest, True, 0, 0, 0, (*faults, str(error)))
    return Verification(folder, has_manifest, True, *facts, tuple(faults), tuple(notices))


def consistency(checkpoint: Checkpoint) -> Iterator[str]:
    """Faults of a checkpoint in itself: quantization states, tensors that the index does not list, config.json."""
    try:
        unlisted = checkpoint.unlisted()
        entry = checkpoint.quantization_config()
    except CheckpointError as error:
        yield str(error)
        return
    yield from (f"{checkpoint.path}: the index does not list {name!r}, which is in a shard" for name in unlisted)
    ours = entry.get("quant_method") == "bitsandbytes" and entry.get("load_in_4bit") is True
    for name in checkpoint.quantized():
        try:
            state = checkpoint.state(name)
        except CheckpointError as error:
            yield str(error)
            continue
        said = entry.get("bnb_4bit_quant_type")
        if ours and said != state.quant_type:
            yield f"{checkpoint.path}: {name!r} is {state.quant_type}, and config.json says {said}"


def against_manifest(
    folder: Path, listing: dict[str, Any], opened: Compound | None = None, weights: bool = True
) -> Iterator[str]:
    """What is not as the manifest says: names, dtypes, shapes, places, counts, every hash, and files that it lacks.

    `weights` False: the hashes of tensors are right, somebody has looked.

    Raises CheckpointError if the folder cannot be opened as a checkpoint.
    """
    source, tensors = opened or Compound(folder), listing["tensors"]
    # earlier versions carried the further modules of sentence-transformers over as files, without a look at the tensors
    entries = {n: info for n, info in source.entries.items() if source.file_name(info) not in listing["files"]}
    yield from (f"{folder}: the tensor {name!r} is not in the manifest" for name in entries if name not in tensors)
    counts = (len(entries), len(source.quantized().keys() & entries), sum(info.nbytes for info in entries.values()))
    totals = dict(zip(("tensors", "quantized", "bytes"), counts, strict=True))
    for key, count in totals.items():
        if listing["totals"].get(key) != count:
            yield f"{folder}: {key}: {count}, and the manifest says {str(listing['totals'].get(key))[:40]}"
    for name, want in tensors.items():
        info = entries.get(name)
        if info is None:
            yield f"{folder}: the tensor {name!r} is missing"
            continue
        have = {
            "file": source.file_name(info),
            "dtype": dtype_name(info.dtype),
            "shape": list(info.shape),
            "offset": info.offset,
            "bytes": info.nbytes,
        }
        wrong = next((key for key, value in have.items() if want[key] != value), None)
        if wrong is not None:
            yield f"{folder}: {name!r}: {wrong} {have[wrong]}, and the manifest says {str(want[wrong])[:80]}"
        elif weights and _hash(info.file, info.offset, info.nbytes) != want["sha256"]:
            yield f"{info.file}: the bytes of {name!r} are not those that were written"
    for name, want in listing["files"].items():
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing"
        elif path.stat().st_size != want["bytes"] or _hash(path, 0, want["bytes"]) != want["sha256"]:
            yield f"{path} is not as it was written"
    yield from unknown_files(folder, listing, source)[0]


def unknown_files(folder: Path, listing: dict[str, Any], source: Compound) -> tuple[list[str], list[str]]:
    """Files that the manifest does not know: those that a loader may read or run, and the others."""
    known = {*listing["files"], MANIFEST_FILE, *(entry["file"] for entry in listing["tensors"].values())}
    known |= source.files.keys()  # one without a tensor; those of others were compared
    faults: list[str] = []
    notices: list[str] = []
    if not folder.is_dir():
        return faults, notices
    for inner, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(inner) / name).is_symlink()]
        for name in sorted([*files, *links]):
            relative = (Path(inner) / name).relative_to(folder)
            if relative.as_posix() not in known:
                harmless = any(part.startswith(".") for part in relative.parts) or _UNREAD.fullmatch(name)
                found = notices if harmless else faults
                found.append(f"{folder / relative} is there, and the manifest does not know it")
    return faults, notices


def _unfinished(left: Path) -> str:
    """That a folder is unfinished, and what continues it."""
    folder = left.parent if left.name == staging.DATA_FOLDER else left
    begun = journal.read_own(folder)
    command = "the command that began it, with --resume,"
    if begun is not None:
        settings = begun.fingerprint.get("settings")
        dequantizing = isinstance(settings, dict) and "dequantize" in settings
        command = f"`fourbit {'dequantize' if dequantizing else 'quantize'} --resume`"
    replaced = folder / staging.REPLACED_FOLDER
    kept = f"; the folder that it was to replace is {replaced}" if replaced.exists() else ""
    return f"{left} is an unfinished folder: {command} continues it{kept}"


def _hash(path: Path, offset: int, nbytes: int) -> str | None:
    """The SHA-256 of a part of a file; None if it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as stream:
            stream.seek(offset)
            return hash_of(stream, nbytes)
    except OSError:
        return None
