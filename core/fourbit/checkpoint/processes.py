"""Which of several processes this one is, where torchrun has started them to do one conversion together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Processes:
    """One of several processes that share a conversion; each is called with the same arguments otherwise.

    Attributes:
        rank: the number of this one, from 0; the one with 0 leads.
        count: of all.
        local_rank: its number among those of this machine.
    """

    rank: int
    count: int
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise ValueError(f"Processes: rank {self.rank} of {self.count}: want one from 0 to count - 1")

    @property
    def leads(self) -> bool:
        """Whether it is the one that decides, and puts the result in place."""
        return self.rank == 0


def from_environment(environment: Mapping[str, str] | None = None) -> Processes | None:
    """What torchrun says of this process; None if it did not start it, or started it alone.

    Other launchers that set RANK, WORLD_SIZE and LOCAL_RANK do as well.
    """
    values = os.environ if environment is None else environment
    try:
        rank, count, local = (int(values[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return Processes(rank, count, local) if count > 1 else None
    except (KeyError, ValueError):
        return None
