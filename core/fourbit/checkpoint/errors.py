"""The errors of this package: a checkpoint that cannot be used, in one line that names the file."""

from __future__ import annotations

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint is malformed, incomplete or not what was asked for; the message names what it is about."""


class LayoutError(CheckpointError):
    """What was made of a tensor is not what the plan said: no later run would do better."""


class SourceChangedError(CheckpointError):
    """The source changed while it was read, so that what was written is of no use."""


def first_of(names: Sequence[str], most: int) -> str:
    """Names for a message: so many at most, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
