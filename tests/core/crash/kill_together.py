"""Kills processes that quantize together at random moments, resumes with another number of them, compares every byte.

    python tests/core/crash/kill_together.py --points 50

As kill_resume.py, whose source it takes: warm processes are forked. What is killed is one of them, the leader as often
as not, or all at once; where it is one the others must end by themselves, in time and with an error that says why.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from fourbit.checkpoint import output, team
from fourbit.checkpoint.processes import Processes
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.staging import unfinished_folder
from fourbit.checkpoint.verify import verify_checkpoint
from tests.core.crash.kill_resume import SHARD_BYTES, check, contents, finish, make_pipeline, make_source

SILENT_SECONDS = 4.0
COUNTS = (1, 2, 2, 3, 3)


def fork_run(src: Path, dst: Path, rank: int, count: int, says: Path) -> int:
    """A child that does its part, continuing what is there; its process id. Its error goes to a file."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        processes = Processes(rank, count) if count > 1 else None
        quantize_checkpoint(src, dst, resume=True, max_shard_size=SHARD_BYTES, processes=processes)
        status = 0
    except BaseException as error:
        says.write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


def start(src: Path, dst: Path, count: int) -> list[int]:
    """All processes of a run."""
    return [fork_run(src, dst, rank, count, dst.with_name(f"says{rank}")) for rank in range(count)]


def ended(pids: list[int], seconds: float) -> list[int]:
    """Wait for all, but not for longer: their exit statuses. What still runs then is killed, and is an error."""
    end = time.monotonic() + seconds
    found: dict[int, int] = {}
    while len(found) < len(pids):
        for pid in set(pids) - found.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                found[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            late = set(pids) - found.keys()
            for pid in late:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"{len(late)} of {len(pids)} processes did not end in {seconds} s")
        time.sleep(0.01)
    return [found[pid] for pid in pids]


def crash(work: Path, src: Path, want: dict[str, bytes], points: int, seconds: float, seed: int) -> dict[str, int]:
    """Kill until `points` kills have hit running processes, and resume each time."""
    dice = random.Random(seed)
    tally = {"kills": 0, "of the leader": 0, "of all": 0, "with something done before": 0, "ends": 0}
    while tally["kills"] < points:
        dst = work / f"dst{tally['ends']}"
        for _ in range(dice.randint(2, 5)):
            count = dice.choice(COUNTS)
            before = unfinished_folder(dst).exists()
            pids = start(src, dst, count)
            time.sleep(dice.uniform(0.1, 0.9) * seconds)
            victims = pids if dice.random() < 0.5 else [pids[0] if dice.random() < 0.5 else dice.choice(pids)]
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            statuses = ended(pids, 60)
            check(dst, want)
            if statuses[0] == 0:  # the leader had come to its end; others may have been killed while they left
                break
            killed = [rank for rank, status in enumerate(statuses) if status == -signal.SIGKILL]
            assert killed, [(dst.with_name(f"says{rank}")).read_text() for rank in range(count)]
            for rank, status in enumerate(statuses):
                if status == 0:  # the leader was killed when all was done
                    assert dst.exists()
                elif rank not in killed:
                    said = dst.with_name(f"says{rank}").read_text()
                    assert status == 1 and any(text in said for text in EXPECTED), said
            tally["kills"] += 1
            tally["of the leader"] += 0 in killed
            tally["of all"] += len(killed) == count > 1
            tally["with something done before"] += before
        count = dice.choice(COUNTS)
        statuses = ended(start(src, dst, count), 120)
        assert statuses == [0] * count, [p.read_text() for p in work.glob("says*")]
        assert contents(dst) == want, "the resumed run's bytes are others"
        assert verify_checkpoint(dst).ok and not unfinished_folder(dst).exists()
        tally["ends"] += 1
    return tally


EXPECTED = ("has said nothing for", "process 0 has not begun", "did not come within")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=50, help="kills that must hit a running process")
    parser.add_argument("--pipeline", action="store_true", help="a folder of several models instead of one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # no pool of threads, which a fork would lack
    output.SYNC_SECONDS = 0.0  # a small model's run would be over before anything is noted
    os.fsync = lambda descriptor: None  # a kill loses nothing that was written
    team.BEAT_SECONDS, team.POLL_SECONDS = 0.1, 0.01
    team.SILENT_SECONDS, team.JOIN_SECONDS, team.LEAVE_SECONDS = SILENT_SECONDS, SILENT_SECONDS, 2.0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        src = (make_pipeline if options.pipeline else make_source)(work / "src")
        source = contents(src)
        assert finish(fork_run(src, work / "want", 0, 1, work / "says")) == 0
        begin = time.monotonic()
        assert ended(start(src, work / "two", 2), 60) == [0, 0]
        seconds = time.monotonic() - begin
        want = contents(work / "want")
        assert contents(work / "two") == want
        tally = crash(work, src, want, options.points, seconds, options.seed)
        assert contents(src) == source, "the source was touched"
        print(f"one run: {seconds:.2f} s; " + ", ".join(f"{key}: {value}" for key, value in tally.items()))
        print("every byte is that of the uninterrupted run")


if __name__ == "__main__":
    sys.exit(main())
