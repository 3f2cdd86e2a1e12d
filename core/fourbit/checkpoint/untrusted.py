"""Links in a folder: followed within it, and nowhere else, since the folder may be a stranger's.

A link such as `notes.txt -> /home/me/.ssh/id_rsa` would put the user's own file into a copy that is passed on. The one
place outside that is known is where the Hub's cache keeps the files of a snapshot.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from fourbit.checkpoint.errors import CheckpointError

_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, all links followed, lies in `folder`, or in the blobs of the snapshot that `folder` is (in)."""
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(home):
        return True
    repository = next((p.parent.parent for p in (home, *home.parents) if p.parent.name == "snapshots"), None)
    if repository is None:
        return False
    if real.parent == repository / "blobs":
        return True
    # newer caches keep one copy for all repositories: huggingface_hub/utils/_shared_blobs.py
    store = repository.parent / "blobs"
    return real.is_relative_to(store) and _SHARED_BLOB.fullmatch(real.relative_to(store).as_posix()) is not None


def require_inside(path: Path, folder: Path) -> None:
    """Raise CheckpointError if `path` is a link that leads out of `folder`."""
    if not stays_inside(path, folder):
        raise CheckpointError(
            f"{path} is a link to {os.path.realpath(path)}, outside of its folder, and is not followed: a folder"
            " could have any file of this machine read so. If it is yours, put the file itself there"
        )
