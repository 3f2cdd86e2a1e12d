"""What ends one of several processes before it is in a team: the others, who wait for it, are told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fourbit.checkpoint import staging, team
from fourbit.checkpoint.conversion import Request
from fourbit.checkpoint.destination import unfinished_folder
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.processes import Processes
from fourbit.checkpoint.team import Team


@contextmanager
def told(request: Request) -> Iterator[None]:
    """Around all that a conversion does: its error, as long as `request.awaited`, is told to the other processes."""
    try:
        yield
    except Exception as error:
        if request.processes is not None and request.awaited:
            tell(request.target, request.processes, error)
        raise


def tell(target: Path, processes: Processes, error: Exception) -> None:
    """Wait until the other processes, which come to make `target`, have heard of an error; five minutes at most.

    The leader needs the unfinished folder for it, which goes again: where it cannot have that, nobody is told. Ctrl-C
    ends the waiting: then it is the error's turn.
    """
    folder = unfinished_folder(target)
    with suppress(CheckpointError, OSError, KeyboardInterrupt):
        if not processes.leads:
            with Team(folder, processes) as members:
                members.tell(error)
            return
        team.require_quiet(folder)
        made = [path for path in (target.parent, *target.parent.parents) if not path.exists()]
        stage = staging.Stage(target)
        try:
            with Team(folder, processes) as members:
                members.tell(error)
        finally:
            stage.release(discard=not os.path.lexists(stage.data))
            for path in made:
                path.rmdir()
