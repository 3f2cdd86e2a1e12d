"""Writing a model folder that can be interrupted at any moment: the frame that every conversion shares.

Layout and fingerprint first, then the tensors through a pipeline into an unfinished folder with a journal, then
the other files, the manifest, a check of all that was written, and last of all the rename.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fourbit.checkpoint import (
    destination,
    disk,
    journal,
    manifest,
    others,
    output,
    parts,
    staging,
    streaming,
    team,
    together,
    verify,
)
from fourbit.checkpoint import fingerprint as fingerprints
from fourbit.checkpoint.conversion import Job, Report
from fourbit.checkpoint.errors import CheckpointError, LayoutError, SourceChangedError
from fourbit.checkpoint.file_layout import Item
from fourbit.checkpoint.processes import Processes
from fourbit.checkpoint.snapshot import Snapshot
from fourbit.checkpoint.team import Team
from fourbit.checkpoint.weight_files import MANIFEST_FILE
from fourbit.functional import NonFiniteError

R = TypeVar("R")


def build(job: Job[R]) -> Report:
    """Write the folder; it is there under its name only once all of it is written and checked.

    Raises:
        CheckpointError: the source changed, the destination exists or cannot be written, or was finished and is
            damaged since.
        NonFiniteError: from `convert`. What is unfinished is removed then, since no later run would do better.
    """
    request, target = job.request, job.request.target
    if request.processes is not None and not request.processes.leads:
        return _follow(job, request.processes)
    beside = _beside(job)
    others.require_free_names(job.source, beside)
    fingerprint = fingerprints.of(job.source, beside, job.settings, job.shards)
    left = destination.unfinished_folder(target)
    team.require_quiet(left)
    kept = staging.tidy(target)
    begun = journal.read(left) if request.resume else None
    replaces = begun.replaces if begun is not None else None
    if request.resume and replaces is None:
        request.awaited = not _is_of(target, fingerprint)  # with which the others have ended
        if _is_finished(job, fingerprint):
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
    request.awaited = False
    try:
        members = Team(stage.folder, request.processes) if request.processes is not None else None
        with members or nullcontext(), _told(target, stage.folder):
            if members is not None:
                members.gather()
            resumed = _fill(job, stage, beside, fingerprint, replaces, members)
            kept = stage.publish(replaces) or kept
            discard = True
            if members is not None:
                members.part()
    except (NonFiniteError, LayoutError, SourceChangedError):
        discard = True
        raise
    finally:
        stage.release(discard or not _has_tensors(stage.folder))
    return _report(job, beside, resumed, kept)


def _follow(job: Job[R], processes: Processes) -> Report:
    """What a process does that does not lead: until it belongs to a run it writes nothing but who it is."""
    request, target = job.request, job.request.target
    beside = _beside(job)
    fingerprint = fingerprints.of(job.source, beside, job.settings, job.shards)
    left = destination.unfinished_folder(target)
    begun = journal.read_own(left) if request.resume else None
    if request.resume and (begun is None or begun.replaces is None) and _is_of(target, fingerprint):
        return _report(job, beside, job.source.nbytes, None)  # the leader looks whether it is whole
    request.awaited = False
    with Team(left, processes) as members, _told(target, left):
        together.follow(job, left, fingerprint, members)
        if not _is_of(target, fingerprint):
            raise CheckpointError(f"process 0 has not put the finished folder in its place, {target}")
    return _report(job, beside, 0, None)


@contextmanager
def _told(target: Path, folder: Path) -> Iterator[None]:
    """What the system says, as an error of the destination."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "; --resume continues once there is room" if full else ""
        raise CheckpointError(f"cannot write {target}: {reason} ({error.filename or folder}){advice}") from error


def _beside(job: Job[R]) -> others.Others:
    """The other files of the source, on this machine."""
    found = others.find(job.source)
    if job.source.remote is not None:
        job.source.remote.fetch_whole(Path(name).as_posix() for name in found.carried)
    return found


def _report(job: Job[R], beside: others.Others, resumed: int, kept: Path | None) -> Report:
    return Report(
        source=job.source.named,
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
    members: Team | None,
) -> int:
    """Write all of `data/`. Returns the source bytes resumed."""
    begun = journal.read(stage.folder) if job.request.resume else None  # again, now that nobody else writes it
    if begun is None or fingerprints.differences(begun.fingerprint, fingerprint) or not stage.data.is_dir():
        begun = None
        stage.clear()
    fresh = journal.Records(fingerprint, replaces, {})
    shared = members is not None or parts.is_begun(stage.folder)
    if shared:
        resumed, hashes = together.lead(job, stage, begun, fresh, members, beside.nbytes)
    else:
        resumed, hashes = _alone(job, stage, begun, fresh, beside.nbytes)
    written = others.write(job.source, beside, stage.data, job.written)
    if job.source.remote is not None:
        job.source.remote.look_again()
    now = fingerprints.of_source(job.source, others.find(job.source))
    if changes := fingerprints.differences(fingerprint, {**fingerprint, "source": now}):
        what = "; ".join(changes)
        raise SourceChangedError(f"{what} while it was read; what was written is removed, please start again")
    if now != fingerprint["source"]:
        try:
            streaming.compare(job, hashes)
        except SourceChangedError as error:
            raise SourceChangedError(f"{error}; what was written is removed, please start again") from None
    fingerprint = {**fingerprint, "source": now}
    listing = manifest.build(stage.data, job.shards, hashes, sorted(written), fingerprint)
    disk.write_json(stage.data / MANIFEST_FILE, listing)
    # where several have written, each has read its part back
    fault = next(iter(verify.against_manifest(stage.data, listing, None, not shared)), None)
    if fault is not None:
        raise CheckpointError(f"reading back what was written failed: {fault}")
    return resumed


def _alone(
    job: Job[R], stage: staging.Stage, begun: journal.Records | None, fresh: journal.Records, room: int
) -> tuple[int, dict[str, dict[str, str]]]:
    """Write the weight files, one after the other. As `together.lead`."""
    done: dict[str, int] = {}
    hashes: dict[str, dict[str, str]] = {}
    if begun is not None:
        done = output.recover(stage.data, job.shards, begun.hashes)
        kept = [item.source for shard in job.shards for item in shard.items[: done.get(shard.file, 0)]]
        hashes = {name: begun.hashes[name] for name in kept}
        if begun.fingerprint != fresh.fingerprint:
            streaming.require_same(job, hashes)
    todo = [(shard, item) for shard in job.shards for item in shard.items[done.get(shard.file, 0) :]]
    headers = sum(len(shard.header) for shard in job.shards)
    staging.check_space(stage.folder, headers + sum(item.nbytes for _, item in todo) + room)
    book = journal.Journal(stage.folder, replace(fresh, hashes=hashes))
    try:
        return _write_weights(job, stage, book, done, todo), book.hashes
    finally:
        book.close()


def _write_weights(
    job: Job[R],
    stage: staging.Stage,
    book: journal.Journal,
    done: Mapping[str, int],
    todo: Sequence[streaming.Entry],
) -> int:
    """Do the items that are not done. Returns the source bytes that were."""
    progress = job.request.progress
    total = sum(map(job.source_bytes, job.items))
    resumed = count = total - sum(job.source_bytes(item) for _, item in todo)

    def written(item: Item) -> None:
        nonlocal count
        count += job.source_bytes(item)
        if progress is not None:
            progress(item.source, count, total)

    if progress is not None and resumed and todo:
        progress(todo[0][1].source, resumed, total)
    empty = [shard for shard in job.shards if not shard.items]
    streaming.write(job, output.Output(stage.data, book, done), todo, empty, written)
    return resumed


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
            streaming.compare(
                job, {item.source: {p.name: tensors[p.name]["sha256"] for p in item.parts} for item in job.items}
            )
        except (SourceChangedError, KeyError) as error:
            raise CheckpointError(f"{target} was made of another source: {error}. --overwrite writes it anew") from None
    return True


def _is_of(target: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether the manifest there is of this run, or of one like it; without a look at anything else."""
    try:
        found = manifest.read(target) if target.is_dir() else None
    except CheckpointError:
        return False
    return found is not None and not fingerprints.differences(found["fingerprint"], fingerprint)


def _leftovers(target: Path, kept: Path | None) -> tuple[Path, ...]:
    """Folders beside the destination that could not be removed, and unfinished ones of other runs or versions."""
    old = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.replaced")
    found = [path for path in target.parent.iterdir() if old.fullmatch(path.name)]
    left = destination.unfinished_folder(target)
    return tuple(sorted({*found, *(path for path in (kept, left) if path is not None and path.exists())}))


def _has_tensors(folder: Path) -> bool:
    begun = journal.read(folder)
    return begun is not None and bool(parts.noted(folder, begun))
