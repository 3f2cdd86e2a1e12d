"""Writing a model folder that can be interrupted at any moment: the frame that every conversion shares.

Layout and fingerprint first, then the tensors through a pipeline into an unfinished folder with a journal, then
the other files, the manifest, a check of all that was written, and last of all the rename.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from fourbit.checkpoint import destination, disk, journal, manifest, others, output, staging, verify
from fourbit.checkpoint import fingerprint as fingerprints
from fourbit.checkpoint.conversion import Job, Report
from fourbit.checkpoint.errors import CheckpointError, LayoutError, SourceChangedError
from fourbit.checkpoint.file_layout import Item, Shard
from fourbit.checkpoint.pipeline import Pipeline
from fourbit.checkpoint.snapshot import Snapshot
from fourbit.checkpoint.weight_files import MANIFEST_FILE
from fourbit.functional import NonFiniteError

R = TypeVar("R")
Entry = tuple[Shard, Item]


def build(job: Job[R]) -> Report:
    """Write the folder; it is there under its name only once all of it is written and checked.

    Raises:
        CheckpointError: the source changed, the destination exists or cannot be written, or was finished and is
            damaged since.
        NonFiniteError: from `convert`. What is unfinished is removed then, since no later run would do better.
    """
    request, target = job.request, job.request.target
    beside = others.find(job.source)
    others.require_free_names(job.source, beside)
    fingerprint = fingerprints.of(job.source, beside, job.settings, job.shards)
    kept = staging.tidy(target)
    left = destination.unfinished_folder(target)
    begun = journal.read(left) if request.resume else None
    replaces = begun.replaces if begun is not None else None
    if request.resume and replaces is None and _is_finished(job, fingerprint):
        return _report(job, beside, job.source.nbytes, kept)
    if left.is_dir() and not (request.overwrite or request.resume):
        raise CheckpointError(
            f"an unfinished run of {target} is there ({left}): --resume continues it, --overwrite starts afresh"
        )
    files = others.every_file(job.source, beside)
    replaces = destination.check(job.source.path, files, target, request.overwrite, replaces)
    if begun is not None and (changes := fingerprints.differences(begun.fingerprint, fingerprint)):
        what = "; ".join(changes)
        raise CheckpointError(f"the unfinished run of {target} cannot be resumed: {what}. --overwrite starts afresh")
    stage = staging.Stage(target)
    discard = False
    try:
        resumed = _fill(job, stage, beside, fingerprint, replaces)
        kept = stage.publish(replaces) or kept
        discard = True
    except (NonFiniteError, LayoutError, SourceChangedError):
        discard = True
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "; --resume continues once there is room" if full else ""
        where = error.filename or stage.folder
        raise CheckpointError(f"cannot write {target}: {reason} ({where}){advice}") from error
    finally:
        stage.release(discard or not _has_tensors(stage.folder))
    return _report(job, beside, resumed, kept)


def _report(job: Job[R], beside: others.Others, resumed: int, kept: Path | None) -> Report:
    return Report(
        source=job.source.path,
        destination=job.request.target,
        files=tuple(shard.file for shard in job.shards),
        bytes_before=job.source.nbytes,
        bytes_after=sum(item.nbytes for item in job.items),
        copied=beside.carried,
        left_out=beside.left_out,
        skipped=beside.skipped,
        resumed_bytes=resumed,
        seconds=time.perf_counter() - job.request.begun,
        leftovers=_leftovers(job.request.target, kept),
    )


def _fill(
    job: Job[R],
    stage: staging.Stage,
    beside: others.Others,
    fingerprint: dict[str, Any],
    replaces: Snapshot | None,
) -> int:
    """Write all of `data/`. Returns the source bytes resumed."""
    begun = journal.read(stage.folder) if job.request.resume else None  # again, now that nobody else writes it
    done: dict[str, int] = {}
    hashes: dict[str, dict[str, str]] = {}
    if begun is None or fingerprints.differences(begun.fingerprint, fingerprint) or not stage.data.is_dir():
        stage.clear()
    else:
        done = output.recover(stage.data, job.shards, begun.hashes)
        kept = [item.source for shard in job.shards for item in shard.items[: done.get(shard.file, 0)]]
        hashes = {name: begun.hashes[name] for name in kept}
        if begun.fingerprint != fingerprint:
            try:
                _compare(job, hashes)
            except SourceChangedError as error:
                raise CheckpointError(
                    f"the unfinished run of {stage.dst} cannot be resumed: {error}. --overwrite starts afresh"
                ) from None
    todo = [(shard, item) for shard in job.shards for item in shard.items[done.get(shard.file, 0) :]]
    headers = sum(len(shard.header) for shard in job.shards)
    staging.check_space(stage.folder, headers + sum(item.nbytes for _, item in todo) + beside.nbytes)
    book = journal.Journal(stage.folder, journal.Records(fingerprint, replaces, hashes))
    try:
        resumed = _write_weights(job, stage, book, done, todo)
    finally:
        book.close()
    written = others.write(job.source, beside, stage.data, job.written)
    now = fingerprints.of_source(job.source, others.find(job.source))
    if changes := fingerprints.differences(fingerprint, {**fingerprint, "source": now}):
        what = "; ".join(changes)
        raise SourceChangedError(f"{what} while it was read; what was written is removed, please start again")
    if now != fingerprint["source"]:
        try:
            _compare(job, book.hashes)
        except SourceChangedError as error:
            raise SourceChangedError(f"{error}; what was written is removed, please start again") from None
    fingerprint = {**fingerprint, "source": now}
    listing = manifest.build(stage.data, job.shards, book.hashes, sorted(written), fingerprint)
    disk.write_json(stage.data / MANIFEST_FILE, listing)
    fault = next(iter(verify.against_manifest(stage.data, listing)), None)
    if fault is not None:
        raise CheckpointError(f"reading back what was written failed: {fault}")
    return resumed


def _write_weights(
    job: Job[R],
    stage: staging.Stage,
    book: journal.Journal,
    done: Mapping[str, int],
    todo: Sequence[Entry],
) -> int:
    """Do the items that are not done. Returns the source bytes that were."""
    progress = job.request.progress
    total = sum(map(job.source_bytes, job.items))
    resumed = count = total - sum(job.source_bytes(item) for _, item in todo)
    target = output.Output(stage.data, book, done)

    def written(entry: Entry) -> None:
        nonlocal count
        count += job.source_bytes(entry[1])
        if progress is not None:
            progress(entry[1].source, count, total)

    if progress is not None and resumed and todo:
        progress(todo[0][1].source, resumed, total)
    try:
        _pipeline(job, lambda entry, tensors: target.write(*entry, tensors), written).run(todo)
        for shard in job.shards:
            if not shard.items:
                target.write_empty(shard)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            target.close()
        raise
    target.close()
    return resumed


def _compare(job: Job[R], hashes: Mapping[str, Mapping[str, str]]) -> None:
    """Convert again what is in `hashes`. Raises SourceChangedError if it comes out otherwise.

    Args:
        hashes: for tensors of the source, the SHA-256 of each tensor that it became.
    """

    def compare(entry: Entry, tensors: Mapping[str, Tensor]) -> None:
        name = entry[1].source
        if output.hashes_of(entry[1], tensors) != hashes.get(name):
            raise SourceChangedError(f"the source's {job.source.info(name).file} has changed: {name!r} is another")

    entries = [(shard, item) for shard in job.shards for item in shard.items if item.source in hashes]
    _pipeline(job, compare, lambda entry: None).run(entries)


def _pipeline(
    job: Job[R], write: Callable[[Entry, Mapping[str, Tensor]], None], done: Callable[[Entry], None]
) -> Pipeline[Entry, R, Mapping[str, Tensor]]:
    return Pipeline(
        read=lambda entry: job.read(entry[1]),
        convert=lambda entry, content: job.convert(entry[1], content),
        write=write,
        cost=lambda entry: job.source_bytes(entry[1]) + entry[1].nbytes,
        budget=job.budget,
        done=done,
    )


def _is_finished(job: Job[R], fingerprint: dict[str, Any]) -> bool:
    """Whether an earlier run came to this end, and all of it is still there. Raises CheckpointError if it is not."""
    target = job.request.target
    found = manifest.read(target) if target.is_dir() else None
    if found is None or fingerprints.differences(found["fingerprint"], fingerprint):
        return False
    faults = verify.verify_checkpoint(target).faults
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CheckpointError(
            f"{target} was finished and is damaged since: {faults[0]}{more}. --overwrite writes it anew"
        )
    if found["fingerprint"]["source"] != fingerprint["source"]:
        tensors = found["tensors"]
        try:
            _compare(job, {item.source: {p.name: tensors[p.name]["sha256"] for p in item.parts} for item in job.items})
        except (SourceChangedError, KeyError) as error:
            raise CheckpointError(f"{target} was made of another source: {error}. --overwrite writes it anew") from None
    return True


def _leftovers(target: Path, kept: Path | None) -> tuple[Path, ...]:
    """Folders beside the destination that could not be removed, and unfinished ones of other runs or versions."""
    old = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.replaced")
    found = [path for path in target.parent.iterdir() if old.fullmatch(path.name)]
    left = destination.unfinished_folder(target)
    return tuple(sorted({*found, *(path for path in (kept, left) if path is not None and path.exists())}))


def _has_tensors(folder: Path) -> bool:
    begun = journal.read(folder)
    return begun is not None and bool(begun.hashes)
