"""Parts of weight files, as several processes write them: some items of a file each, put together when all are there.

A part is a file in `parts/` of the unfinished folder whose name says which items of which weight file it is to have;
the journal says which it has. Only the process that began a part writes it, and what it has noted it never changes: a
process of an earlier run that is still at it does no harm, and any number of processes can continue.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import IO

from fourbit.checkpoint import disk, journal, output
from fourbit.checkpoint.file_layout import Item, Shard
from fourbit.checkpoint.journal import Records
from fourbit.checkpoint.staging import PARTS_FOLDER

_NAME = re.compile(r"([0-9a-f]{16})\.(\d+)\.(\d+)\.(\d+)\.part")
_JOURNAL = re.compile(r"[0-9a-f]{16}\.\d+\.jsonl")


@dataclass(frozen=True)
class Span:
    """Items of a weight file: which file, by its number, and from which item to before which."""

    shard: int
    first: int
    stop: int


@dataclass(frozen=True)
class Part:
    """A file with some items of a weight file, and its header if the first is among them.

    Attributes:
        span: what it has, or is to get.
        run: by which it was begun.
        stop: before which item it was to end. If it has all, nobody writes it any more.
    """

    span: Span
    run: str
    stop: int

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{self.run}.{self.span.shard}.{self.span.first}.{self.stop}.part"

    @property
    def sealed(self) -> bool:
        """Whether nobody writes it any more."""
        return self.span.stop == self.stop


def planned(span: Span, run: str) -> Part:
    """A part that has all that it is to get."""
    return Part(span, run, span.stop)


def within(shard: Shard, part: Part) -> Shard:
    """A part as a file of its own, for `Output`."""
    header = shard.header if part.span.first == 0 else b""
    return Shard(part.name, header, shard.items[part.span.first : part.stop], shard.prefix)


def nbytes(shard: Shard, span: Span) -> int:
    """Bytes of the items, and of the header if it goes with them."""
    header = len(shard.header) if span.first == 0 else 0
    return header + sum(item.nbytes for item in shard.items[span.first : span.stop])


def journal_name(run: str, rank: int) -> str:
    """The name of a process's journal."""
    return f"{run}.{rank}.jsonl"


def is_begun(unfinished: Path) -> bool:
    """Whether several processes have begun there."""
    return (unfinished / PARTS_FOLDER).is_dir()


def noted(unfinished: Path, begun: Records, run: str = "") -> dict[str, dict[str, str]]:
    """What the journals say together: the main one, and each process's that is of the same fingerprint.

    With `run`, those of that one alone beside the main one.
    """
    hashes = dict(begun.hashes)
    folder = unfinished / PARTS_FOLDER
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        if _JOURNAL.fullmatch(name) and name.startswith(run):
            found = journal.read_own(folder, name)
            if found is not None and found.fingerprint == begun.fingerprint:
                hashes |= found.hashes
    return hashes


def recover(
    unfinished: Path, data: Path, shards: Sequence[Shard], hashes: Mapping[str, dict[str, str]], run: str
) -> list[Part]:
    """Parts that are there, right to the last bit, and have no item twice; all in `parts/`. Nothing else is left.

    What one process alone has written to `data` becomes a part of `run`. Raises OSError.
    """
    folder = unfinished / PARTS_FOLDER
    folder.mkdir(exist_ok=True)
    found: list[Part] = []
    for number, shard in enumerate(shards):
        for path in (data / shard.file, disk.temporary(data / shard.file)):
            count, end = output.intact(path, shard, hashes)
            if count:
                os.truncate(path, end)
                part = planned(Span(number, 0, count), run)
                os.replace(path, folder / part.name)
                found.append(part)
    for name in os.listdir(folder):
        match = _NAME.fullmatch(name)
        if match is None or match[1] == run:
            continue
        number, first, stop = map(int, match.groups()[1:])
        if number < len(shards) and 0 <= first < stop <= len(shards[number].items):
            part = Part(Span(number, first, stop), match[1], stop)
            count, _ = output.intact(folder / name, within(shards[number], part), hashes)
            if count:
                found.append(replace(part, span=Span(number, first, first + count)))
    return _without_overlaps(found)


def _without_overlaps(found: Sequence[Part]) -> list[Part]:
    """Parts without what others have, too; such as those that were being put together."""
    kept: list[Part] = []
    for part in sorted(found, key=lambda part: (part.span.shard, part.span.first, -part.span.stop)):
        before = kept[-1].span if kept else None
        if before is not None and before.shard == part.span.shard and before.stop > part.span.first:
            if part.span.stop <= before.stop or part.span.first == before.first:
                continue
            kept[-1] = replace(kept[-1], span=replace(before, stop=part.span.first))
        kept.append(part)
    return kept


def remove_others(unfinished: Path, data: Path, keep: Sequence[Part]) -> None:
    """Remove what is in `data/` and `parts/` but these parts. Raises OSError."""
    for path in data.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    names = {part.name for part in keep}
    for path in (unfinished / PARTS_FOLDER).iterdir():
        if path.name not in names:
            path.unlink(missing_ok=True)


def gaps(shards: Sequence[Shard], there: Sequence[Part]) -> list[Span]:
    """The items that are in no part."""
    found: list[Span] = []
    for number, shard in enumerate(shards):
        at = 0
        for part in (part for part in there if part.span.shard == number):
            found.append(Span(number, at, part.span.first))
            at = part.span.stop
        found.append(Span(number, at, len(shard.items)))
    return [span for span in found if span.first < span.stop]


def divided(
    spans: Sequence[Span], shards: Sequence[Shard], count: int, cost: Callable[[Item], int]
) -> list[list[Span]]:
    """Spans among so many processes, in order, with about the same cost for each: a weight is not divided."""
    items = [(span, i) for span in spans for i in range(span.first, span.stop)]
    costs = [cost(shards[span.shard].items[i]) for span, i in items]
    total, before = max(sum(costs), 1), 0
    found: list[list[Span]] = [[] for _ in range(count)]
    owners = []
    for each in costs:
        owners.append(min((2 * before + each) * count // (2 * total), count - 1))
        before += each
    for (owner, span), group in groupby(zip(owners, items, strict=True), key=lambda pair: (pair[0], pair[1][0])):
        numbers = [i for _, (_, i) in group]
        found[owner].append(Span(span.shard, numbers[0], numbers[-1] + 1))
    return found


def join(unfinished: Path, shard: Shard, chain: Sequence[Part], run: str, check: Callable[[], None]) -> None:
    """Put the parts of a weight file together, in one that has all of it; its own parts go.

    Nothing is copied but what comes after the first part, and a first part that somebody may still be writing.
    Raises OSError, and what `check` does, which is called now and then.
    """
    folder = unfinished / PARTS_FOLDER
    whole = planned(Span(chain[0].span.shard, 0, len(shard.items)), run)
    first, *rest = chain
    if first.name == whole.name:
        return
    if first.sealed:
        os.replace(folder / first.name, folder / whole.name)
        os.truncate(folder / whole.name, nbytes(shard, first.span))  # a crash may have left more
    else:
        rest = list(chain)
        (folder / whole.name).unlink(missing_ok=True)
    with open(folder / whole.name, "ab") as target:
        for part in rest:
            with open(folder / part.name, "rb") as source:
                _copy(source, target, nbytes(shard, part.span), check)
        disk.flush_to_disk(target)
    disk.sync_folder(folder)
    check()
    for part in chain:
        if part.name != whole.name:
            (folder / part.name).unlink(missing_ok=True)


def _copy(source: IO[bytes], target: IO[bytes], left: int, check: Callable[[], None]) -> None:
    while left:
        check()
        chunk = source.read(min(left, disk.CHUNK_BYTES))
        if not chunk:
            raise OSError(f"{source.name} is shorter than it was")
        target.write(chunk)
        left -= len(chunk)


def move(unfinished: Path, data: Path, shards: Sequence[Shard], run: str) -> None:
    """Give weight files that are in one piece their names in `data/`. Raises OSError."""
    for number, shard in enumerate(shards):
        if shard.items:
            whole = planned(Span(number, 0, len(shard.items)), run)
            (data / shard.file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(unfinished / PARTS_FOLDER / whole.name, data / shard.file)
