"""Reading, converting and writing at the same time, in order, with a bound on the bytes in between.

Reading and writing have a thread each and converting stays in the caller's, where torch's own threads are. The
results are those of a plain loop.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")  # what is to be done
R = TypeVar("R")  # what reading gives
C = TypeVar("C")  # what converting gives
X = TypeVar("X")

POLL_SECONDS = 0.2
"""How often a waiting thread looks whether another one failed; Ctrl-C is seen at once on most systems."""


class Pipeline(Generic[T, R, C]):
    """Reads, converts and writes each job, in the order given.

    Args:
        read, convert, write: the three steps of a job.
        cost: bytes that a job has in memory from its reading to its writing.
        budget: bytes that all jobs in memory may have; one job alone may have more.
        done: called in the caller's thread, in order, for jobs that are written.
    """

    def __init__(
        self,
        read: Callable[[T], R],
        convert: Callable[[T, R], C],
        write: Callable[[T, C], None],
        cost: Callable[[T], int],
        budget: int,
        done: Callable[[T], None],
    ) -> None:
        self._read, self._convert, self._write, self._cost, self._done = read, convert, write, cost, done
        self._budget = budget
        self._in_use = 0
        self._room = threading.Condition()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._was_read: SimpleQueue[tuple[T, R] | None] = SimpleQueue()
        self._converted: SimpleQueue[tuple[T, C] | None] = SimpleQueue()
        self._written: deque[T] = deque()

    def run(self, jobs: Sequence[T]) -> None:
        """Do all jobs. The first exception of any step ends it and is raised here, when the threads have ended."""
        threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"fourbit-{name}", daemon=True)
            for name, work in (("read", lambda: self._reading(jobs)), ("write", self._writing))
        ]
        for thread in threads:
            thread.start()
        try:
            self._converting()
        except BaseException:
            self._halt()
            raise
        finally:
            self._converted.put(None)
            for thread in threads:
                thread.join()
            self._report()
        if self._error is not None:
            raise self._error

    def _converting(self) -> None:
        while (entry := self._next(self._was_read)) is not None:
            job, content = entry
            del entry  # or the source would stay in memory until the next one is here
            made = self._convert(job, content)
            del content
            self._converted.put((job, made))
            del made
            self._report()

    def _reading(self, jobs: Sequence[T]) -> None:
        for job in jobs:
            if not self._admit(self._cost(job)):
                return
            self._was_read.put((job, self._read(job)))
        self._was_read.put(None)

    def _writing(self) -> None:
        while (entry := self._next(self._converted)) is not None:
            job, made = entry
            del entry
            self._write(job, made)
            del made
            self._written.append(job)
            with self._room:
                self._in_use -= self._cost(job)
                self._room.notify()

    def _admit(self, nbytes: int) -> bool:
        """Wait until there is room for a job. False if all is to end."""
        with self._room:
            while self._in_use and self._in_use + nbytes > self._budget:
                if self._stop.is_set():
                    return False
                self._room.wait(POLL_SECONDS)
            self._in_use += nbytes
            return not self._stop.is_set()

    def _next(self, queue: SimpleQueue[tuple[T, X] | None]) -> tuple[T, X] | None:
        """The queue's next entry; None at its end, or if all is to end."""
        while not self._stop.is_set():
            try:
                return queue.get(timeout=POLL_SECONDS)
            except Empty:
                continue
        return None

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = self._error or error
            self._halt()

    def _halt(self) -> None:
        self._stop.set()

    def _report(self) -> None:
        while self._written:
            self._done(self._written.popleft())
