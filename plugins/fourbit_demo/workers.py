"""Fresh processes for the steps of a command: JSON lines come back, progress first and the result last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, TextIO

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""

_QUIET = {
    "HF_HUB_OFFLINE": "1",  # nothing is fetched by name
    "TQDM_DISABLE": "1",  # our own bars are enough
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONIOENCODING": "utf-8",
}


class WorkerError(RuntimeError):
    """A step failed in its process; the message has the last line that it wrote, `details` has all of it."""

    def __init__(self, step: str, details: str) -> None:
        lines = [line for line in details.splitlines() if line.strip()]
        super().__init__(f"{step} failed: {lines[-1] if lines else 'the process died without a word'}")
        self.details = details


def run(step: str, module: str, arguments: Sequence[str], progress: Progress | None = None) -> dict[str, Any]:
    """Run `python -m module arguments`, and return the result that it reports.

    Raises WorkerError if it fails.
    """
    command = [sys.executable, "-m", module, *arguments]
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **_QUIET}) as process:
            assert process.stdout is not None
            try:
                result = _follow(process.stdout, progress)
            except BaseException:
                process.kill()
                raise
        if process.returncode or result is None:
            errors.seek(0)
            raise WorkerError(step, errors.read().decode("utf-8", "replace"))
    return result


def _follow(lines: Any, progress: Progress | None) -> dict[str, Any] | None:
    result: dict[str, Any] | None = None
    for line in lines:
        message = json.loads(line)
        if "progress" in message and progress is not None:
            progress(*message["progress"])
        result = message.get("result", result)
    return result


class Channel:
    """The worker's end: takes stdout for itself, so that nobody's stray print can get between the lines."""

    def __init__(self) -> None:
        self._stream: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def progress(self, done: int, total: int) -> None:
        """Report steps."""
        self._send({"progress": [done, total]})

    def result(self, value: dict[str, Any]) -> None:
        """Report the result."""
        self._send({"result": value})

    def _send(self, message: dict[str, Any]) -> None:
        self._stream.write(json.dumps(message) + "\n")
        self._stream.flush()
