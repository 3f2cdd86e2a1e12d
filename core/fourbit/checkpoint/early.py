"""What ends one of several processes before it is in a team: the others, who wait for it, are told."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fourbit.checkpoint import staging, team
from fourbit.checkpoint.conversion import Request
from fourbit.checkpoint.destination import unfinished_folder
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.processes import Processes
from fourbit.checkpoint.team import Team
from fourbit.literal import literal

_log = logging.getLogger(__name__)


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

    The leader needs the unfinished folder for it, which goes again: where it cannot have that, nobody is told. Who
    looks on learns of the error when that takes long. Ctrl-C ends the waiting: then it is the error's turn.
    """
    said = "%s; until the other processes know, %.0f s at most, this one waits"
    notice = threading.Timer(team.LEAVE_SECONDS, _log.warning, (said, literal(str(error)), team.JOIN_SECONDS))
    notice.daemon = True
    notice.start()
    try:
        with suppress(CheckpointError, OSError, KeyboardInterrupt):
            (_as_leader if processes.leads else _as_follower)(target, processes, error)
    finally:
        notice.cancel()


def _as_follower(target: Path, processes: Processes, error: Exception) -> None:
    with Team(unfinished_folder(target), processes) as members:
        members.tell(error)


def _as_leader(target: Path, processes: Processes, error: Exception) -> None:
    team.require_quiet(unfinished_folder(target))
    made = [path for path in (target.parent, *target.parent.parents) if not path.exists()]
    stage = staging.Stage(target)
    try:
        with Team(stage.folder, processes) as members:
            members.tell(error)
    finally:
        stage.release(discard=not os.path.lexists(stage.data))
        for path in made:
            path.rmdir()
