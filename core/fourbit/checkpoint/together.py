"""One conversion by several processes: the leader says who writes which items, all write, put together, read back.

The leader is the process that has the unfinished folder; the rest of a conversion (checks, other files, manifest, the
last rename) is its alone. A run that several processes began is continued by any number, also by one.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, TypeVar

from fourbit.checkpoint import fingerprint as fingerprints
from fourbit.checkpoint import journal, output, parts, records, staging, streaming, team
from fourbit.checkpoint.conversion import Job
from fourbit.checkpoint.disk import hash_of
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.file_layout import Item
from fourbit.checkpoint.parts import Part, Span
from fourbit.checkpoint.staging import PARTS_FOLDER, TEAM_FOLDER
from fourbit.checkpoint.team import Team

R = TypeVar("R")
Hashes = dict[str, dict[str, str]]


class Work:
    """What one process does of a conversion, when the leader has said what.

    Args:
        job: the conversion, the same for all.
        unfinished: the unfinished folder.
        run: of the leader.
        there: parts that were there before.
        todo: for each process, the items that it writes.
        rank: of this process.
        team: None for one alone.
    """

    def __init__(
        self,
        job: Job[R],
        unfinished: Path,
        run: str,
        there: Sequence[Part],
        todo: Sequence[Sequence[Span]],
        rank: int,
        team: Team | None,
    ) -> None:
        self._job, self._unfinished, self._run, self._rank, self._team = job, unfinished, run, rank, team
        self._there, self._todo = there, todo
        self._done = 0

    def do(self, book: journal.Journal, kept: Mapping[str, dict[str, str]], resumed: int) -> None:
        """Write this process's items, put files together and read back; wait for the others after each.

        Args:
            book: this process's journal.
            kept: the hashes of what was there before.
            resumed: bytes of the source that were.
        """
        self._write(book, resumed)
        self._barrier(team.WRITTEN)
        for number, shard in enumerate(self._job.shards):
            if shard.items and number % len(self._todo) == self._rank:
                parts.join(self._unfinished, shard, self._chain(number), self._run, self._check)
        self._barrier(team.WHOLE)
        mine = [*self._todo[self._rank], *self._share([part.span for part in self._there], lambda item: item.nbytes)]
        self._read_back(mine, {**kept, **book.hashes})
        self._barrier(team.CHECKED)

    def room(self) -> int:
        """Bytes that are needed beside those of the items, while files are put together."""
        need = [0] * len(self._todo)
        for number, shard in enumerate(self._job.shards):
            chain = self._chain(number)
            copied = [part for i, part in enumerate(chain) if i or not part.sealed]
            owner = number % len(self._todo)
            need[owner] = max(need[owner], sum(parts.nbytes(shard, part.span) for part in copied))
        return sum(need)

    def _write(self, book: journal.Journal, resumed: int) -> None:
        job, progress = self._job, self._job.request.progress
        total = sum(map(job.source_bytes, job.items))
        shards = [
            parts.within(job.shards[span.shard], parts.planned(span, self._run)) for span in self._todo[self._rank]
        ]
        folder = self._unfinished / PARTS_FOLDER
        if progress is not None and resumed and shards:
            progress(shards[0].items[0].source, resumed, total)

        def done(item: Item) -> None:
            nbytes = job.source_bytes(item)
            self._done = self._team.advance(nbytes) if self._team is not None else self._done + nbytes
            if progress is not None:
                progress(item.source, min(resumed + self._done, total), total)
            self._check()

        target = output.Output(folder, book, {}, unfinished=lambda path: path)
        streaming.write(job, target, [(shard, item) for shard in shards for item in shard.items], (), done)

    def _read_back(self, spans: Sequence[Span], hashes: Mapping[str, Mapping[str, str]]) -> None:
        for span in spans:
            shard = self._job.shards[span.shard]
            whole = parts.planned(Span(span.shard, 0, len(shard.items)), self._run)
            path = self._unfinished / PARTS_FOLDER / whole.name
            with open(path, "rb") as stream:
                if stream.read(len(shard.header)) != shard.header:
                    raise CheckpointError(f"reading back what was written failed: {path}: its header is another")
                stream.seek(sum(item.nbytes for item in shard.items[: span.first]), os.SEEK_CUR)
                for item in shard.items[span.first : span.stop]:
                    self._check()
                    for part in item.parts:
                        if hash_of(stream, part.nbytes) != hashes.get(item.source, {}).get(part.name):
                            raise CheckpointError(
                                f"reading back what was written failed: {path}: the bytes of {part.name!r} are not"
                                " those that were written"
                            )

    def _share(self, spans: Sequence[Span], cost: Any) -> list[Span]:
        return parts.divided(spans, self._job.shards, len(self._todo), cost)[self._rank]

    def _chain(self, number: int) -> list[Part]:
        """The parts of a weight file, in order, when all are written."""
        new = (parts.planned(span, self._run) for spans in self._todo for span in spans)
        found = [part for part in (*self._there, *new) if part.span.shard == number]
        return sorted(found, key=lambda part: part.span.first)

    def _check(self) -> None:
        if self._team is not None:
            self._team.check()

    def _barrier(self, phase: int) -> None:
        if self._team is not None:
            self._team.barrier(phase)


def lead(
    job: Job[R],
    stage: staging.Stage,
    begun: journal.Records | None,
    fresh: journal.Records,
    members: Team | None,
    room: int,
) -> tuple[int, Hashes]:
    """The leader's part, or all of it: every weight file in `data/` at the end, read back.

    Args:
        job: the conversion.
        stage: its folder.
        begun: what an earlier run noted of what is in it; None: nothing counts.
        fresh: this run's journal.
        members: the processes; None for one alone, which continues what several began.
        room: bytes that other files need.

    Returns the source bytes that were done before, and the hashes of all that is written. Raises CheckpointError
    if what an earlier run has read was another source.
    """
    run, count = (members.token, members.processes.count) if members is not None else (secrets.token_hex(8), 1)
    noted = parts.noted(stage.folder, begun) if begun is not None else {}
    there = parts.recover(stage.folder, stage.data, job.shards, noted, run)
    kept = {
        item.source: noted[item.source]
        for part in there
        for item in job.shards[part.span.shard].items[part.span.first : part.span.stop]
    }
    if begun is not None and begun.fingerprint != fresh.fingerprint:
        streaming.require_same(job, kept)
    todo = parts.divided(parts.gaps(job.shards, there), job.shards, count, job.source_bytes)
    work = Work(job, stage.folder, run, there, todo, 0, members)
    left = sum(parts.nbytes(job.shards[span.shard], span) for spans in todo for span in spans)
    staging.check_space(stage.folder, left + work.room() + room)
    fresh = replace(fresh, hashes=kept)
    journal.Journal(stage.folder, fresh).close()
    parts.remove_others(stage.folder, stage.data, there)
    resumed = sum(job.source_bytes(item) for item in job.items if item.source in kept)
    if members is not None:
        plan: dict[str, Any] = {"there": [[part.run, part.stop, *astuple(part.span)] for part in there]}
        plan |= {"todo": [[astuple(span) for span in spans] for spans in todo], "resumed": resumed}
        records.write(stage.folder / TEAM_FOLDER / "plan", {"run": run, "of": fresh.fingerprint, **plan})
        members.barrier(team.READY)
    book = _journal(stage.folder, fresh.fingerprint, run, 0)
    try:
        work.do(book, kept, resumed)
    finally:
        book.close()
    hashes = parts.noted(stage.folder, fresh, run)
    parts.move(stage.folder, stage.data, job.shards, run)
    return resumed, hashes


def follow(job: Job[R], unfinished: Path, fingerprint: dict[str, Any], members: Team) -> None:
    """What any process but the leader does, from its coming to the end of all.

    Raises CheckpointError if the leader reads another source, or is asked for something else, or fails.
    """
    members.join()
    members.barrier(team.READY)
    plan = records.read(unfinished / TEAM_FOLDER / "plan")
    if plan is None or plan.get("run") != members.token:
        raise CheckpointError(f"{unfinished} cannot be read as the leader wrote it")
    if changes := fingerprints.differences(plan["of"], fingerprint):
        raise CheckpointError(f"this process is to do something else than process 0: {'; '.join(changes)}")
    there = [Part(Span(*span), run, stop) for run, stop, *span in plan["there"]]
    todo = [[Span(*span) for span in spans] for spans in plan["todo"]]
    begun = journal.read(unfinished)
    kept = begun.hashes if begun is not None else {}
    work = Work(job, unfinished, members.token, there, todo, members.processes.rank, members)
    book = _journal(unfinished, plan["of"], members.token, members.processes.rank)
    try:
        work.do(book, kept, int(plan["resumed"]))
    finally:
        book.close()
    members.part()


def _journal(unfinished: Path, fingerprint: dict[str, Any], run: str, rank: int) -> journal.Journal:
    name = parts.journal_name(run, rank)
    return journal.Journal(unfinished / PARTS_FOLDER, journal.Records(fingerprint, None, {}), name)
