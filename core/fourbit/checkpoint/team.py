"""Several processes that do one conversion, on one machine or on several that share a folder: who does, and how far.

Each process has a record of its own in `team/` of the unfinished folder, which it overwrites every second: who it is
(a random number), how far it is, and what stopped it. Others look whether that changes, by their own clock. The
leader's `run` says who belongs to it. So every process ends, with a reason, soon after another one has failed, was
killed, or lost its machine.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fourbit.checkpoint import records
from fourbit.checkpoint.errors import CheckpointError, LayoutError, SourceChangedError
from fourbit.checkpoint.processes import Processes
from fourbit.checkpoint.staging import TEAM_FOLDER
from fourbit.functional import NonFiniteError

BEAT_SECONDS = 1.0
"""How often a process says that it is there."""
POLL_SECONDS = 0.1
SILENT_SECONDS = 120.0
"""A process that has said nothing for so long is taken for dead: a busy disk, or server, can stop one for a minute."""
JOIN_SECONDS = 300.0
"""So long the processes wait for each other at the beginning: machines and torch take their time to start."""
QUIET_BEATS = 5
"""So many signs of life must be missing before a run on another machine is taken for dead."""
LEAVE_SECONDS = 10.0
"""So long the leader waits at the end until the others have seen how it ended."""

COME, READY, WRITTEN, WHOLE, CHECKED, DONE = range(6)
"""How far a process is: it has come; the leader has said what is to be done; its part is written; files are in one
piece; its part was read back; the folder is in its place."""

_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (CheckpointError, NonFiniteError, LayoutError, SourceChangedError)
}


class Peer:
    """What another process has said, and when that was something new, by this process's clock."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.said: dict[str, Any] = {}
        self.heard = time.monotonic()

    def look(self) -> dict[str, Any]:
        """Read its record."""
        with suppress(OSError):
            said = records.read(self._path)
            if said is not None and said != self.said:
                self.said, self.heard = said, time.monotonic()
        return self.said

    @property
    def silent(self) -> bool:
        """Whether it has said nothing new for long."""
        return time.monotonic() - self.heard > SILENT_SECONDS


class Team:
    """This process among the others. Usable in a `with` statement: what ends it is told to them.

    Args:
        unfinished: the unfinished folder, which the leader makes.
        processes: which one this is.
    """

    def __init__(self, unfinished: Path, processes: Processes) -> None:
        self.processes = processes
        self.token = ""
        self.ended = False
        self._folder = unfinished / TEAM_FOLDER
        self._me = secrets.token_hex(8)
        self._said: dict[str, Any] = {"me": self._me, "host": socket.gethostname(), "pid": os.getpid()}
        self._said |= {"run": "", "phase": COME, "bytes": 0, "error": "", "kind": "", "beat": 0}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._settled = self._replaced = False
        self._leader = ""
        self._peers = {rank: Peer(self._path(rank)) for rank in range(processes.count) if rank != processes.rank}
        self._checked = 0.0
        self._end = time.monotonic() + JOIN_SECONDS
        self._thread = threading.Thread(target=self._beating, name="fourbit-team", daemon=True)

    def __enter__(self) -> Team:
        if self.processes.leads:
            self._folder.mkdir(exist_ok=True)
        else:
            require_quiet(self._folder.parent, leads=False)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: object) -> None:
        if error is not None and not self._replaced and not self.ended:
            self._fail(error)
        self._stop()

    # ---- what this process says

    def say(self, **said: Any) -> None:
        """Tell the others, at once."""
        with self._lock:
            self._said |= said
        self._write()

    def advance(self, nbytes: int) -> int:
        """Count bytes of the source as done; returns those of all processes."""
        self._said["bytes"] += nbytes  # is written with the next beat
        return int(self._said["bytes"]) + sum(int(peer.said.get("bytes", 0)) for peer in self._peers.values())

    def _path(self, rank: int) -> Path:
        return self._folder / f"{rank}"

    def _write(self) -> None:
        with self._lock, suppress(OSError):  # no folder yet, or a server that will be back
            path = self._path(self.processes.rank)
            there = records.read(path)
            if self._settled and there is not None and there.get("me") != self._me:
                self._replaced = True  # and from now on silent
            if not self._replaced:
                self._said["beat"] += 1
                records.write(path, self._said)

    def _beating(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            self._write()

    def tell(self, error: Exception) -> None:
        """For a process that fails before the others know it: wait until they do, but no longer than all wait."""
        self._fail(error)
        if not self.processes.leads:
            with suppress(CheckpointError, OSError):
                self.join()  # of those who belong to no run nobody takes notice

    def _fail(self, error: BaseException) -> None:
        self.ended = True
        kind = next((name for name, each in reversed(_KINDS.items()) if isinstance(error, each)), "")
        text = str(error) or type(error).__name__
        self.say(error=text[:4000], kind=kind)
        if self.processes.leads:
            with suppress(CheckpointError, OSError):
                patience = self._end - time.monotonic() if isinstance(error, Exception) else 0.0
                self._call(max(patience, LEAVE_SECONDS))  # also those who come only now are to know
                self._wait(lambda said: bool(said.get("error")), LEAVE_SECONDS, heed=False)

    # ---- what the others say

    def gather(self) -> None:
        """For the leader: wait until all have come. Raises CheckpointError if they do not."""
        self.token = secrets.token_hex(8)
        self.say(run=self.token)
        self._call(JOIN_SECONDS)
        self._settled = True  # only now: a process of an earlier run may have written once more

    def _call(self, seconds: float) -> None:
        """Write who belongs to this run until each has seen it."""
        self.token = self.token or secrets.token_hex(8)
        end, listed = time.monotonic() + seconds, None
        while True:
            names = [self._me, *(str(self._peers[rank].look().get("me", "")) for rank in sorted(self._peers))]
            if names != listed:
                records.write(self._folder / "run", {"run": self.token, "team": names})
                listed = names
            missing = [rank for rank, peer in self._peers.items() if peer.said.get("run") != self.token]
            if not missing:
                return
            if not self.ended:
                self._require_mine()
                self._heed(joined=True)
            if time.monotonic() > end:
                some = ", ".join(map(str, missing[:10]))
                raise CheckpointError(
                    f"of {self.processes.count} processes {len(missing)} did not come within {seconds:.0f} s (rank"
                    f" {some}): do all machines share the folder {self._folder.parent.parent}? A process alone must not"
                    " have RANK and WORLD_SIZE in its environment"
                )
            time.sleep(POLL_SECONDS)

    def join(self) -> None:
        """For the others: wait until the leader has listed this process. Raises CheckpointError if it does not."""
        while True:
            self._write()
            self._require_mine()
            with suppress(OSError):
                run = records.read(self._folder / "run") or {}
                team = run.get("team")
                if isinstance(team, list) and len(team) == self.processes.count:
                    if team[self.processes.rank] == self._me:
                        self.token, self._leader = str(run.get("run")), team[0]
                        self.say(run=self.token)
                        self._settled = True
                        return
            if time.monotonic() > self._end:
                raise CheckpointError(
                    f"process 0 has not begun within {JOIN_SECONDS:.0f} s: it has failed, or this machine does not"
                    f" share the folder {self._folder.parent.parent} with it"
                )
            time.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Raise if another process has failed, is silent, or has this one's place; looks once a second at most."""
        now = time.monotonic()
        if now - self._checked >= BEAT_SECONDS:
            self._checked = now
            self._require_mine()
            for peer in self._watched():
                peer.look()
            self._heed()

    def barrier(self, phase: int) -> None:
        """Wait until every process is so far. Raises as `check` does."""
        if self.processes.leads:
            self._wait(lambda said: said.get("phase", 0) >= phase)
            self.say(phase=phase)
        else:
            self.say(phase=phase)
            self._wait(lambda said: said.get("phase", 0) >= phase)

    def part(self) -> None:
        """At the end, when the folder is in its place: the leader waits until the others know, but not for long."""
        self.ended = True
        if self.processes.leads:
            self.say(phase=DONE)
            with suppress(CheckpointError):
                self._wait(lambda said: said.get("phase", 0) >= DONE, LEAVE_SECONDS, heed=False)
            self._stop()
        else:
            self._wait(lambda said: said.get("phase", 0) >= DONE or not self._folder.is_dir())
            self._stop()
            self.say(phase=DONE)

    def _stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _watched(self) -> list[Peer]:
        """The leader looks at all, the others at the leader, which passes on what it sees."""
        return list(self._peers.values()) if self.processes.leads else [self._peers[0]]

    def _wait(self, so: Callable[[dict[str, Any]], bool], seconds: float | None = None, heed: bool = True) -> None:
        end = None if seconds is None else time.monotonic() + seconds
        while not all([so(peer.look()) for peer in self._watched()]):
            if heed:
                self._require_mine()
                self._heed()
            if end is not None and time.monotonic() > end:
                raise CheckpointError("others do not answer")
            time.sleep(POLL_SECONDS)

    def _require_mine(self) -> None:
        if self._replaced:
            raise CheckpointError(f"another run has taken the place of this one ({self._folder.parent})")

    def _heed(self, joined: bool = False) -> None:
        """Raise if a process that belongs to this run has failed or is silent."""
        for rank, peer in self._peers.items():
            said = peer.said
            if not self.processes.leads:
                if rank != 0:
                    continue
                if said and said.get("me") != self._leader:
                    raise CheckpointError(f"another run has taken the place of this one ({self._folder.parent})")
            elif said.get("run") != self.token:
                continue  # of an earlier run
            if said.get("error"):
                kind = _KINDS.get(str(said.get("kind")), CheckpointError)
                text = str(said["error"])
                raise kind(text if text.startswith("process ") else f"process {rank} ({said.get('host')}): {text}")
            if peer.silent and not (joined and not said):
                raise CheckpointError(
                    f"process {rank} ({said.get('host')}) has said nothing for {SILENT_SECONDS:.0f} s: it was killed,"
                    " or its machine is gone; --resume continues"
                )


def require_quiet(unfinished: Path, leads: bool = True) -> None:
    """Raise CheckpointError if another run is writing there, also on another machine, whatever its lock says.

    For one that leads, the lock is enough where the last leader was on this machine. One that does not must not take
    a place in a run that has begun without it, and cannot ask for the lock, which its own leader may have. Else it
    takes the time of a few signs of life.
    """
    path = unfinished / TEAM_FOLDER / "0"
    if not os.path.lexists(path):
        return
    leader = Peer(path)
    said = now = leader.look()
    if not said or said.get("error") or said.get("phase") == DONE:
        return
    if leads and said.get("host") == socket.gethostname():
        return
    end = time.monotonic() + QUIET_BEATS * BEAT_SECONDS
    while time.monotonic() < end:
        if not leads and (now.get("phase") == COME or now.get("me") != said.get("me")):
            return  # it waits for others, as this one's does
        if now != said:
            raise CheckpointError(f"another run is writing there: {said.get('host')}, process {said.get('pid')}")
        time.sleep(POLL_SECONDS)
        now = leader.look()
