"""What a conversion of a model folder is asked for, what it writes, and what it reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from fourbit.checkpoint import layouts
from fourbit.checkpoint.compound import Compound, Member
from fourbit.checkpoint.file_layout import Item, Shard, arrange, index, parse_size
from fourbit.checkpoint.processes import Processes
from fourbit.checkpoint.urls import refuse_destination
from fourbit.checkpoint.weight_files import CONFIG_FILE, index_file

Progress = Callable[[str, int, int], None]
"""Called after each tensor with its name, the source bytes done so far, and all source bytes."""

SMALL_BUDGET = 1 << 26
"""Bytes that may be in memory between reading and writing however small the tensors are."""

R = TypeVar("R")


class Request:
    """What the caller of a conversion asks for, and when.

    Args:
        caller: the name of the function that is called, for its errors.
        dst: the new folder.
        overwrite: begin afresh, and replace the destination if it is a model folder.
        resume: continue an unfinished folder, if there is one; what is finished already stays. Where the source's
            files are others than those that were read, though nothing shows in them, what is done is converted again
            and compared.
        progress: called after each tensor, in this thread.
        max_shard_size: of weight files; see `file_layout.parse_size`.
        processes: which of several this one is; each must ask for the same.

    Attributes:
        awaited: whether the other processes wait for this one, and hear of what ends it only if `early` tells them.

    Raises CheckpointError for a destination that is a URL, ValueError for both `overwrite` and `resume`, and for a size
    that is none.
    """

    def __init__(
        self,
        caller: str,
        dst: str | Path,
        overwrite: bool,
        resume: bool,
        progress: Progress | None,
        max_shard_size: int | str | None,
        processes: Processes | None = None,
    ) -> None:
        self.begun = time.perf_counter()
        if overwrite and resume:
            raise ValueError(f"{caller}: overwrite begins afresh and resume does not: want one of them")
        refuse_destination(dst)
        self.target = Path(dst).expanduser().resolve()
        self.overwrite, self.resume, self.progress = overwrite, resume, progress
        self.processes = processes if processes is not None and processes.count > 1 else None
        self.awaited = True
        self.max_shard_bytes = parse_size(max_shard_size)


@dataclass(frozen=True)
class Job(Generic[R]):
    """What is to be written, and how.

    Attributes:
        request: of the user.
        source: what is read.
        items: what each of its tensors becomes, in its order.
        settings: as JSON values, all that determines the output beside the source.
        configs: each model's new config.json, by its folder, where it is another one; None: it has none then.
        read: what an item is made of; in a thread of its own.
        convert: an item's tensors by name, on the CPU, from that.
    """

    request: Request
    source: Compound
    items: Sequence[Item]
    settings: dict[str, Any]
    configs: Mapping[str, dict[str, Any] | None]
    read: Callable[[Item], R]
    convert: Callable[[Item, R], Mapping[str, Tensor]]

    @cached_property
    def shards(self) -> list[Shard]:
        """The new weight files."""
        return [shard for member in self.source.members.values() for shard in self._shards_of(member)]

    def _shards_of(self, member: Member) -> list[Shard]:
        checkpoint, most = member.checkpoint, self.request.max_shard_bytes
        if self.source.layout.kind == layouts.SENTENCES and member.part.left:
            most = max(most, checkpoint.nbytes)  # its modules read one file
        mine = set(self.source.of_member(member))
        items = [item for item in self.items if item.source in mine]
        return arrange(items, {**checkpoint.metadata, "format": "pt"}, most, checkpoint.stem, member.prefix)

    @cached_property
    def written(self) -> dict[str, Mapping[str, Any] | None]:
        """The new indexes, and each config.json that is another one, by relative name; None for what goes."""
        found: dict[str, Mapping[str, Any] | None] = {}
        for folder, member in self.source.members.items():
            shards = [shard for shard in self.shards if shard.prefix == member.prefix]
            if len(shards) > 1:
                found[member.prefix + index_file(member.checkpoint.stem)] = index(shards)
            if folder in self.configs:
                found[member.prefix + CONFIG_FILE] = self.configs[folder]
        return found

    @property
    def budget(self) -> int:
        """Bytes of sources and results in memory: twice the largest tensor, and temporaries may have as much again."""
        return max(2 * max(map(self.source_bytes, self.items), default=0), SMALL_BUDGET)

    def source_bytes(self, item: Item) -> int:
        """Bytes that an item's reading takes: those of the tensor and, if it is in 4 bits, of its state."""
        parts = (item.source, *self.source.parts_of(item.source))
        return sum(self.source.info(name).nbytes for name in parts)


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        source, destination: the folders; the source may be a URL.
        files: names of the weight files written.
        bytes_before: of the source's tensors; bytes_after: of the tensors written. Code tables and metadata included.
        copied: other files carried over.
        left_out: files with weights in other forms or of other models, which were not.
        skipped: what else was not, with the reason: links out of the source, pipes, devices.
        resumed_bytes: of the source's tensors, that an earlier run had done.
        seconds: that it took.
        leftovers: folders beside the new one that runs left and that are not known to be of no use.
    """

    source: Path | str
    destination: Path
    files: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    skipped: dict[str, str]
    resumed_bytes: int
    seconds: float
    leftovers: tuple[Path, ...]

    def _as_json(self, **tensors: Any) -> dict[str, Any]:
        """As JSON values, with what became of the tensors in second place."""
        return {
            "source": str(self.source),
            "destination": str(self.destination),
            **tensors,
            "files": list(self.files),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "copied": list(self.copied),
            "left_out": list(self.left_out),
            "skipped": self.skipped,
            "resumed_bytes": self.resumed_bytes,
            "seconds": self.seconds,
            "leftovers": [str(path) for path in self.leftovers],
        }
