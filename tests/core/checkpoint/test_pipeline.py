"""The pipeline: order, errors, and the bound on the bytes in memory."""

from __future__ import annotations

import threading

import pytest

from fourbit.checkpoint.pipeline import Pipeline

TIMEOUT = 60  # of what never takes long, so that a deadlock fails instead of hanging


class Counted:
    """A pipeline of jobs that are numbers, their own cost; counts what is in memory.

    The first write waits until reading either waits for room or has read what it may not.
    """

    def __init__(self, budget: int, total: int) -> None:
        self.in_memory = self.most = self.total = 0
        self.read, self.wrote = [], []
        self._lock, self._go = threading.Lock(), threading.Event()
        self._limit = total
        self.pipeline = Pipeline(self._read, lambda job, content: content, self._write, int, budget, self.wrote.append)
        wait = self.pipeline._room.wait

        def waits(timeout):
            self._go.set()  # no room: nothing is read until something is written
            return wait(timeout)

        self.pipeline._room.wait = waits

    def _read(self, job):
        with self._lock:
            self.in_memory += job
            self.most = max(self.most, self.in_memory)
            self.read.append(job)
            if len(self.read) == self._limit:
                self._go.set()
        return job

    def _write(self, job, content):
        assert self._go.wait(TIMEOUT), "reading neither waits nor ends"
        with self._lock:
            self.in_memory -= job


@pytest.mark.parametrize(
    "jobs, budget, most",
    [
        ([1] * 20, 3, 3),
        ([2] * 20, 5, 4),  # a third one would be more than 5
        ([5, 1, 1, 5, 1], 4, 5),  # one alone may have more
        ([1] * 4, 100, 4),
    ],
)
def test_bytes_in_memory_are_bounded(jobs, budget, most):
    counted = Counted(budget, len(jobs))
    counted.pipeline.run(jobs)
    assert counted.wrote == counted.read == jobs
    assert counted.most == most and counted.in_memory == 0


@pytest.mark.parametrize("step", ("read", "convert", "write"))
def test_the_first_error_ends_it(step):
    done = []

    def failing(name):
        def work(job, *content):
            if name == step and job == 3:
                raise RuntimeError(f"{name} {job}")
            return job

        return work

    pipeline = Pipeline(failing("read"), failing("convert"), failing("write"), lambda job: 1, 2, done.append)
    with pytest.raises(RuntimeError, match=f"{step} 3"):
        pipeline.run(range(10))
    assert done == [0, 1, 2][: len(done)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fourbit-")]
