"""From what a user names as a source to a path: also the Hub's cache, and an id of the Hub. No network, ever."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from fourbit.checkpoint.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[\w.-]+")


def located(path: str | os.PathLike[str]) -> Path:
    """The folder or file that is meant.

    That is `path` itself, but for two things: the root of a repository in the Hub's cache (`models--org--name`) means
    the snapshot that its refs/main names, or its only one; and "org/name", where there is no such path, means the
    snapshot of that model in the Hub's cache.

    Raises CheckpointError if there is no such snapshot, or several. A path that does not exist comes back as it is.
    """
    given = Path(path).expanduser()
    if (given / "snapshots").is_dir() and ((given / "blobs").is_dir() or (given / "refs").is_dir()):
        return _snapshot(given)
    if not os.path.lexists(given) and _HUB_ID.fullmatch(given.as_posix()):
        return _cached(given.as_posix())
    return given


def resolved(path: str | os.PathLike[str]) -> Path:
    """`located`, as an absolute path without links in it, but for the last component of a file's path.

    A file's name says what it is, and in the Hub's cache what its link leads to has another.
    """
    found = located(path)
    return found.parent.resolve() / found.name if found.is_file() else found.resolve()


def _snapshot(repository: Path) -> Path:
    main = repository / "refs" / "main"
    revision = ""
    if main.is_file():
        with open(main, encoding="utf-8", errors="replace") as stream:
            revision = stream.read(256).strip()
    if revision and _REVISION.fullmatch(revision) and (repository / "snapshots" / revision).is_dir():
        return repository / "snapshots" / revision
    found = sorted(p for p in (repository / "snapshots").iterdir() if p.is_dir())
    if len(found) == 1:
        return found[0]
    if not found:
        raise CheckpointError(f"{repository} is a repository in the Hub's cache, and has no snapshot yet")
    names = ", ".join(p.name for p in found[:4])
    raise CheckpointError(f"{repository} has {len(found)} snapshots ({names}), and no refs/main; name one of them")


def _cached(name: str) -> Path:
    fetch = f"`hf download {name} --local-dir FOLDER` fetches it; name FOLDER then. fourbit itself fetches nothing"
    if find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"{name} does not exist. If it is a model of the Hub: huggingface_hub, which knows the Hub's cache, is not"
            f" installed; {fetch}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # LocalEntryNotFoundError, HFValidationError
        raise CheckpointError(f"{name} does not exist, and the Hub's cache has no such model. {fetch}") from None
