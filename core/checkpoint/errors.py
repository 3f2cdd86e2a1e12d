"""The error of this package: a checkpoint that cannot be used, in one line that names the file."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint is malformed, incomplete or not what was asked for; the message names what it is about."""
