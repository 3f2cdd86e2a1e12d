"""Writing a model folder that can be interrupted at any moment: the frame that every conversion shares.

Layout and fingerprint first, then the tensors through a pipeline into an unfinished folder with a journal, then
the other files, the manifest, a check of all that was written, and last of all the rename.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from fourbit.checkpoint import fingerprint as fingerprints
from fourbit.checkpoint import journal, layout, manifest, others, output, shards, staging, verify, writer
from fourbit.checkpoint.errors import CheckpointError, LayoutError, SourceChangedError
from fourbit.checkpoint.pipeline import Pipeline
from fourbit.checkpoint.reader import Checkpoint
from fourbit.functional import NonFiniteError

Progress = Callable[[str, int, int], None]
"""Called after each tensor with its name, the source bytes done so far, and all source bytes."""

SMALL_BUDGET = 1 << 26
"""Bytes that may be in memory between reading and writing however small the tensors are."""

R = TypeVar("R")


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
    """

    others: others.Others
    resumed_bytes: int


def build(job: Job[R], *, overwrite: bool, resume: bool, progress: Progress | None) -> Built:
    """Write the folder; it is there under its name only once all of it is written and checked.

    Args:
        job: what to write.
        overwrite: begin afresh, and replace the destination if it is a model folder.
        resume: continue an unfinished folder, if there is one; what is finished already stays.
        progress: called after each tensor, in this thread.

    Raises:
        CheckpointError: the source changed, the destination exists or cannot be written.
        NonFiniteError: from `convert`. What is unfinished is removed then, since no later run would do better.
    """
    source, target = job.checkpoint.path, job.target
    fingerprint = fingerprints.of(job.checkpoint, job.settings, job.layouts)
    if resume and _is_finished(target, fingerprint):
        _remove_leftover(target)
        return Built(others.find(job.checkpoint), job.checkpoint.nbytes)
    left = staging.unfinished_folder(target)
    begun = journal.read(left) if resume else None
    replace = overwrite or (begun is not None and begun.replace)
    staging.check_destination(source, target, replace)
    if left.is_dir() and not (overwrite or resume):
        staging.check_unlocked(target)
        raise CheckpointError(
            f"an unfinished run of {target} is there ({left}): --resume continues it, --overwrite starts afresh"
        )
    if begun is not None and begun.fingerprint != fingerprint:
        what = "; ".join(fingerprints.differences(begun.fingerprint, fingerprint))
        raise CheckpointError(f"the unfinished run of {target} cannot be resumed: {what}. --overwrite starts afresh")
    stage = staging.Stage(target)
    discard = False
    try:
        built = _fill(job, stage, fingerprint, resume, replace, progress)
        stage.publish(replace)
        discard = True
        return built
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


def _fill(
    job: Job[R],
    stage: staging.Stage,
    fingerprint: dict[str, Any],
    resume: bool,
    replace: bool,
    progress: Progress | None,
) -> Built:
    begun = journal.read(stage.folder) if resume else None  # again, now that nobody else writes it
    done: dict[str, int] = {}
    hashes: dict[str, dict[str, str]] = {}
    if begun is None or begun.fingerprint != fingerprint or not stage.data.is_dir():
        stage.clear()
    else:
        done = output.recover(stage.data, job.layouts, begun.hashes)
        kept = [item.source for shard in job.layouts for item in shard.items[: done.get(shard.file, 0)]]
        hashes = {name: begun.hashes[name] for name in kept}
    todo = [(shard, item) for shard in job.layouts for item in shard.items[done.get(shard.file, 0) :]]
    headers = sum(len(shard.header) for shard in job.layouts)
    beside = others.find(job.checkpoint)
    staging.check_space(stage.folder, headers + sum(item.nbytes for _, item in todo) + beside.nbytes)
    book = journal.Journal(stage.folder, journal.Records(fingerprint, replace, hashes))
    try:
        resumed = _write_weights(job, stage, book, done, todo, progress)
    finally:
        book.close()
    written = _write_others(job, stage.data, beside)
    listing = manifest.build(stage.data, job.layouts, book.hashes, sorted(written), fingerprint)
    writer.write_json(stage.data / layout.MANIFEST_FILE, listing)
    fault = next(iter(verify.against_manifest(stage.data, listing)), None)
    if fault is not None:
        raise CheckpointError(f"reading back what was written failed: {fault}")
    now = fingerprints.of_source(job.checkpoint)
    if now != fingerprint["source"]:
        what = "; ".join(fingerprints.differences(fingerprint, {**fingerprint, "source": now}))
        raise SourceChangedError(f"{what} while it was read; what was written is removed, please start again")
    return Built(beside, resumed)


def _write_weights(
    job: Job[R],
    stage: staging.Stage,
    book: journal.Journal,
    done: Mapping[str, int],
    todo: Sequence[tuple[shards.Shard, shards.Item]],
    progress: Progress | None,
) -> int:
    """Do the items that are not done. Returns the source bytes that were."""
    total = sum(job.source_bytes(item) for shard in job.layouts for item in shard.items)
    resumed = count = total - sum(job.source_bytes(item) for _, item in todo)
    target = output.Output(stage.data, book, done)

    def written(entry: tuple[shards.Shard, shards.Item]) -> None:
        nonlocal count
        count += job.source_bytes(entry[1])
        if progress is not None:
            progress(entry[1].source, count, total)

    if progress is not None and resumed and todo:
        progress(todo[0][1].source, resumed, total)
    pipeline: Pipeline[tuple[shards.Shard, shards.Item], R, Mapping[str, Tensor]] = Pipeline(
        read=lambda entry: job.read(entry[1]),
        convert=lambda entry, content: job.convert(entry[1], content),
        write=lambda entry, tensors: target.write(*entry, tensors),
        cost=lambda entry: job.cost(entry[1]),
        budget=job.budget,
        done=written,
    )
    try:
        pipeline.run(todo)
        for shard in job.layouts:
            if not shard.items:
                target.write_empty(shard)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            target.close()
        raise
    target.close()
    return resumed


def _write_others(job: Job[R], folder: Path, beside: others.Others) -> list[str]:
    """Write all that is no weight; its names."""
    written: dict[str, dict[str, Any]] = {}
    if len(job.layouts) > 1:
        written[layout.index_file(job.checkpoint.stem)] = shards.index(job.layouts)
    if job.config is not None:
        written[layout.CONFIG_FILE] = job.config
    writer.copy_files(beside.carried, job.checkpoint.path, folder)
    for name, value in written.items():
        writer.write_json(folder / name, value)
    return [*beside.carried, *written]


def _is_finished(target: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether an earlier run of this fingerprint came to its end."""
    try:
        found = manifest.read(target)
    except CheckpointError:
        return False
    return found is not None and found["fingerprint"] == fingerprint


def _remove_leftover(target: Path) -> None:
    """A run that ended between the rename and its cleaning up leaves a folder without data."""
    left = staging.unfinished_folder(target)
    if left.is_dir() and not (left / staging.DATA_FOLDER).exists():
        staging.Stage(target).release(discard=True)


def _has_tensors(folder: Path) -> bool:
    begun = journal.read(folder)
    return begun is not None and bool(begun.hashes)
