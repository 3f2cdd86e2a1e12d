"""Writing a model folder that can be interrupted at any moment: the frame that every conversion shares.

Layout and fingerprint first, then the tensors through a pipeline into an unfinished folder with a journal, then
the other files, the manifest, a check of all that was written, and last of all the rename.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from fourbit.checkpoint import destination, journal, layout, manifest, others, output, shards, staging, verify, writer
from fourbit.checkpoint import fingerprint as fingerprints
from fourbit.checkpoint.errors import CheckpointError, LayoutError, SourceChangedError
from fourbit.checkpoint.pipeline import Pipeline
from fourbit.checkpoint.reader import Checkpoint
from fourbit.checkpoint.snapshot import Snapshot
from fourbit.functional import NonFiniteError

Progress = Callable[[str, int, int], None]
"""Called after each tensor with its name, the source bytes done so far, and all source bytes."""

SMALL_BUDGET = 1 << 26
"""Bytes that may be in memory between reading and writing however small the tensors are."""

R = TypeVar("R")
Entry = tuple[shards.Shard, shards.Item]


@dataclass(frozen=True)
class Job(Generic[R]):
    """What is to be written, and how.

    Attributes:
        checkpoint: the source.
        target: the new folder, a resolved path.
        layouts: its weight files.
        settings: as JSON values, all that determines the output beside the source.
        config: the new config.json; None: there is none.
        read: what an item is made of; in a thread of its own.
        convert: an item's tensors by name, on the CPU, from that.
        source_bytes: that an item's reading takes.
    """

    checkpoint: Checkpoint
    target: Path
    layouts: Sequence[shards.Shard]
    settings: dict[str, Any]
    config: dict[str, Any] | None
    read: Callable[[shards.Item], R]
    convert: Callable[[shards.Item, R], Mapping[str, Tensor]]
    source_bytes: Callable[[shards.Item], int]

    @property
    def budget(self) -> int:
        """Bytes of sources and results in memory: twice the largest tensor, and temporaries may have as much again."""
        sizes = [self.source_bytes(item) for shard in self.layouts for item in shard.items]
        return max(2 * max(sizes, default=0), SMALL_BUDGET)

    def cost(self, item: shards.Item) -> int:
        """Bytes of one item in memory: the source, and what is made of it."""
        return self.source_bytes(item) + item.nbytes


@dataclass(frozen=True)
class Built:
    """What `build` did.

    Attributes:
        others: the other files of the source: those carried over, and those left out.
        resumed_bytes: of the source, that an earlier run had done.
        leftovers: folders beside the new one that runs left and that are not known to be of no use.
    """

    others: others.Others
    resumed_bytes: int
    leftovers: tuple[Path, ...]


def build(job: Job[R], *, overwrite: bool, resume: bool, progress: Progress | None) -> Built:
    """Write the folder; it is there under its name only once all of it is written and checked.

    Args:
        job: what to write.
        overwrite: begin afresh, and replace the destination if it is a model folder.
        resume: continue an unfinished folder, if there is one; what is finished already stays. Where the source's
            files are others than those that were read, though nothing shows in them, what is done is converted again
            and compared.
        progress: called after each tensor, in this thread.

    Raises:
        CheckpointError: the source changed, the destination exists or cannot be written, or was finished and is
            damaged since.
        NonFiniteError: from `convert`. What is unfinished is removed then, since no later run would do better.
    """
    source, target = job.checkpoint.path, job.target
    others.require_free_names(job.checkpoint)
    fingerprint = fingerprints.of(job.checkpoint, job.settings, job.layouts)
    kept = staging.tidy(target)
    left = destination.unfinished_folder(target)
    begun = journal.read(left) if resume else None
    replaces = begun.replaces if begun is not None else None
    if resume and replaces is None and _is_finished(job, fingerprint):
        return Built(others.find(job.checkpoint), job.checkpoint.nbytes, _leftovers(target, kept))
    if left.is_dir() and not (overwrite or resume):
        raise CheckpointError(
            f"an unfinished run of {target} is there ({left}): --resume continues it, --overwrite starts afresh"
        )
    replaces = destination.check(source, others.every_file(job.checkpoint), target, overwrite, replaces)
    if begun is not None and (changes := fingerprints.differences(begun.fingerprint, fingerprint)):
        what = "; ".join(changes)
        raise CheckpointError(f"the unfinished run of {target} cannot be resumed: {what}. --overwrite starts afresh")
    stage = staging.Stage(target)
    discard = False
    try:
        beside, resumed = _fill(job, stage, fingerprint, resume, replaces, progress)
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
    return Built(beside, resumed, _leftovers(target, kept))


def _fill(
    job: Job[R],
    stage: staging.Stage,
    fingerprint: dict[str, Any],
    resume: bool,
    replaces: Snapshot | None,
    progress: Progress | None,
) -> tuple[others.Others, int]:
    """Write all of `data/`. Returns the other files, copied and left out, and the source bytes resumed."""
    begun = journal.read(stage.folder) if resume else None  # again, now that nobody else writes it
    done: dict[str, int] = {}
    hashes: dict[str, dict[str, str]] = {}
    if begun is None or fingerprints.differences(begun.fingerprint, fingerprint) or not stage.data.is_dir():
        stage.clear()
    else:
        done = output.recover(stage.data, job.layouts, begun.hashes)
        kept = [item.source for shard in job.layouts for item in shard.items[: done.get(shard.file, 0)]]
        hashes = {name: begun.hashes[name] for name in kept}
        if begun.fingerprint != fingerprint:
            try:
                _compare(job, hashes)
            except SourceChangedError as error:
                raise CheckpointError(
                    f"the unfinished run of {stage.dst} cannot be resumed: {error}. --overwrite starts afresh"
                ) from None
    todo = [(shard, item) for shard in job.layouts for item in shard.items[done.get(shard.file, 0) :]]
    headers = sum(len(shard.header) for shard in job.layouts)
    beside = others.find(job.checkpoint)
    staging.check_space(stage.folder, headers + sum(item.nbytes for _, item in todo) + beside.nbytes)
    book = journal.Journal(stage.folder, journal.Records(fingerprint, replaces, hashes))
    try:
        resumed = _write_weights(job, stage, book, done, todo, progress)
    finally:
        book.close()
    written = others.write(job.checkpoint, beside, stage.data, job.layouts, job.config)
    now = fingerprints.of_source(job.checkpoint)
    if changes := fingerprints.differences(fingerprint, {**fingerprint, "source": now}):
        what = "; ".join(changes)
        raise SourceChangedError(f"{what} while it was read; what was written is removed, please start again")
    if now != fingerprint["source"]:
        try:
            _compare(job, book.hashes)
        except SourceChangedError as error:
            raise SourceChangedError(f"{error}; what was written is removed, please start again") from None
    fingerprint = {**fingerprint, "source": now}
    listing = manifest.build(stage.data, job.layouts, book.hashes, sorted(written), fingerprint)
    writer.write_json(stage.data / layout.MANIFEST_FILE, listing)
    fault = next(iter(verify.against_manifest(stage.data, listing)), None)
    if fault is not None:
        raise CheckpointError(f"reading back what was written failed: {fault}")
    return beside, resumed


def _write_weights(
    job: Job[R],
    stage: staging.Stage,
    book: journal.Journal,
    done: Mapping[str, int],
    todo: Sequence[Entry],
    progress: Progress | None,
) -> int:
    """Do the items that are not done. Returns the source bytes that were."""
    total = sum(job.source_bytes(item) for shard in job.layouts for item in shard.items)
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
        for shard in job.layouts:
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
        if writer.hashes_of(entry[1], tensors) != hashes.get(name):
            raise SourceChangedError(f"the source's {job.checkpoint.info(name).file} has changed: {name!r} is another")

    entries = [(shard, item) for shard in job.layouts for item in shard.items if item.source in hashes]
    _pipeline(job, compare, lambda entry: None).run(entries)


def _pipeline(
    job: Job[R], write: Callable[[Entry, Mapping[str, Tensor]], None], done: Callable[[Entry], None]
) -> Pipeline[Entry, R, Mapping[str, Tensor]]:
    return Pipeline(
        read=lambda entry: job.read(entry[1]),
        convert=lambda entry, content: job.convert(entry[1], content),
        write=write,
        cost=lambda entry: job.cost(entry[1]),
        budget=job.budget,
        done=done,
    )


def _is_finished(job: Job[R], fingerprint: dict[str, Any]) -> bool:
    """Whether an earlier run came to this end, and all of it is still there. Raises CheckpointError if it is not."""
    target = job.target
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
        items = [item for shard in job.layouts for item in shard.items]
        try:
            _compare(job, {item.source: {p.name: tensors[p.name]["sha256"] for p in item.parts} for item in items})
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
