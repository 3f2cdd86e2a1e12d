"""Items of a conversion through the pipeline: to be written, or to be compared with what was written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

from torch import Tensor

from fourbit.checkpoint import output
from fourbit.checkpoint.conversion import Job
from fourbit.checkpoint.errors import CheckpointError, SourceChangedError
from fourbit.checkpoint.file_layout import Item, Shard
from fourbit.checkpoint.output import Output
from fourbit.checkpoint.pipeline import Pipeline

R = TypeVar("R")
Entry = tuple[Shard, Item]


def write(
    job: Job[R], target: Output, todo: Sequence[Entry], empty: Sequence[Shard], done: Callable[[Item], None]
) -> None:
    """Convert and write items, in order, then files without any; what is complete at an error is noted.

    `done` is called in this thread after each item.
    """
    try:
        _pipeline(job, lambda entry, tensors: target.write(*entry, tensors), lambda entry: done(entry[1])).run(todo)
        for shard in empty:
            target.write_empty(shard)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            target.close()
        raise
    target.close()


def compare(job: Job[R], hashes: Mapping[str, Mapping[str, str]]) -> None:
    """Convert again what is in `hashes`. Raises SourceChangedError if it comes out otherwise.

    Args:
        job: of the conversion.
        hashes: for tensors of the source, the SHA-256 of each tensor that it became.
    """

    def same(entry: Entry, tensors: Mapping[str, Tensor]) -> None:
        name = entry[1].source
        if output.hashes_of(entry[1], tensors) != hashes.get(name):
            raise SourceChangedError(f"the source's {job.source.info(name).file} has changed: {name!r} is another")

    entries = [(shard, item) for shard in job.shards for item in shard.items if item.source in hashes]
    _pipeline(job, same, lambda entry: None).run(entries)


def require_same(job: Job[R], hashes: Mapping[str, Mapping[str, str]]) -> None:
    """`compare` for what an earlier run has written. Raises CheckpointError: what it left stays."""
    try:
        compare(job, hashes)
    except SourceChangedError as error:
        raise CheckpointError(
            f"the unfinished run of {job.request.target} cannot be resumed: {error}. --overwrite starts afresh"
        ) from None


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
