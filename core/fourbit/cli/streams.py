"""The standard streams of a command: also where they are closed, end early, or have few characters."""

from __future__ import annotations

import codecs
import os
import sys
from typing import TextIO

_ASCII = {
    **dict.fromkeys("─━═╌┄╴╶╺╸", "-"),
    **dict.fromkeys("│┃║╎┆", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╰╯┏┓┗┛┡┩╇╈╋┳┻┣┫╞╡╪╔╗╚╝", "+"),
    **dict.fromkeys("“”„", '"'),
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("–—−", "-"),
    **{"×": "x", "→": "->", "…": "...", "•": "*", "≤": "<=", "≥": ">=", "±": "+-", "µ": "u", "\xa0": " "},
}
"""What stands for characters that an encoding lacks."""


def prepare() -> None:
    """Make the streams usable, before anything else opens a file or prints.

    A closed one leads to the null device: the next file that is opened would get its number otherwise, and whatever
    a library writes to "stderr" would go into that file. What an encoding lacks is written in ASCII.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    codecs.register_error("fourbit_ascii", _replaced)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="fourbit_ascii")


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in found), error.end


def finish() -> OSError | None:
    """Write what is still in the buffers. Returns what kept that from working: a closed pipe, a full disk.

    The interpreter would find it at its end, and say so at length.
    """
    fault = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            fault = fault or error
            abandon(stream)
    return fault


def abandon(stream: TextIO) -> None:
    """Lead a stream to the null device, so that what is left in its buffer goes somewhere."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):
        pass  # no stream of the system: nothing is in its way
