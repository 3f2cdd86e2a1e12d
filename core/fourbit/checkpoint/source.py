"""From what a user names as a source to a path: also the Hub's cache, and an id of the Hub. No network, ever."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.urls import require_local

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OLD_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*")
"""Of the first models, such as gpt2."""
_REVISION = re.compile(r"[\w.-]+")


def located(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder or file that is meant.

    That is `path` itself, but for two things: the root of a repository in the Hub's cache (`models--org--name`) means
    the snapshot that its refs/main names, or its only one; and "org/name", where there is no such path, means the
    snapshot of that model in the Hub's cache. `revision`, a branch, a tag or a commit, is that of such a model.

    Raises CheckpointError for a URL, if there is no such snapshot, or several, or a revision of what is none of these
    two. A path that does not exist comes back as it is.
    """
    require_local(path, "this reads what is on this machine")
    given = Path(path).expanduser()
    if (given / "snapshots").is_dir() and ((given / "blobs").is_dir() or (given / "refs").is_dir()):
        return _snapshot(given, revision)
    if not os.path.lexists(given):
        if _HUB_ID.fullmatch(given.as_posix()):
            return _cached(given.as_posix(), revision)
        if _OLD_HUB_ID.fullmatch(given.as_posix()) and find_spec("huggingface_hub") is not None:
            return _looked_up(given.as_posix(), revision) or given
    if revision is not None:
        what = "is a path" if os.path.lexists(given) else "is no model"
        raise CheckpointError(f"{given} {what}, not the Hub's name of one: it has no revision {revision!r}")
    return given


def cached_name(path: Path) -> tuple[str, str] | None:
    """The Hub's name of a model and the revision that `path`, in the snapshot of a cache, is (of); None elsewhere."""
    for folder in (path, *path.parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.parent.parent.name.removeprefix("models--").replace("--", "/"), folder.name
    return None


def how_to_complete(path: Path) -> str:
    """For the end of a message that a file is missing: what fetches it, where `path` is in the Hub's cache."""
    found = cached_name(path)
    if found is None:
        return ""
    name, revision = found
    return (
        f"; the Hub's cache has only a part of {name}, and `hf download {name} --revision {revision}` fetches the rest"
    )


def resolved(path: str | os.PathLike[str]) -> Path:
    """`located`, as an absolute path without links in it, but for the last component of a file's path.

    A file's name says what it is, and in the Hub's cache what its link leads to has another.
    """
    found = located(path)
    return found.parent.resolve() / found.name if found.is_file() else found.resolve()


def _is_revision(name: str) -> bool:
    """Whether it is one component of a path, and not the folder itself or the one around it."""
    return _REVISION.fullmatch(name) is not None and bool(name.strip("."))


def _snapshot(repository: Path, wanted: str | None) -> Path:
    if wanted is not None and _is_revision(wanted) and (repository / "snapshots" / wanted).is_dir():
        return repository / "snapshots" / wanted
    reference = ("main" if wanted is None else wanted).split("/")
    if not all(map(_is_revision, reference)):
        raise CheckpointError(f"{wanted!r} is no revision")
    main = repository.joinpath("refs", *reference)
    revision = ""
    if main.is_file():
        with open(main, encoding="utf-8", errors="replace") as stream:
            revision = stream.read(256).strip()
    if _is_revision(revision) and (repository / "snapshots" / revision).is_dir():
        return repository / "snapshots" / revision
    if wanted is not None:
        raise CheckpointError(f"{repository} is a repository in the Hub's cache, and has no snapshot of {wanted!r}")
    found = sorted(p for p in (repository / "snapshots").iterdir() if p.is_dir())
    if len(found) == 1:
        return found[0]
    if not found:
        raise CheckpointError(f"{repository} is a repository in the Hub's cache, and has no snapshot yet")
    names = ", ".join(p.name for p in found[:4])
    raise CheckpointError(f"{repository} has {len(found)} snapshots ({names}), and no refs/main; name one of them")


def _cached(name: str, revision: str | None) -> Path:
    which = "" if revision is None else f" of the revision {revision!r}"
    fetch = f"`hf download {name}{'' if revision is None else f' --revision {revision}'}` fetches it into the cache"
    fetch += "; fourbit itself fetches nothing"
    if find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"{name} does not exist. If it is a model of the Hub: huggingface_hub, which knows the Hub's cache, is not"
            f" installed; {fetch}"
        )
    found = _looked_up(name, revision)
    if found is None:
        raise CheckpointError(f"{name} does not exist, and the Hub's cache has no such model{which}. {fetch}")
    return found


def _looked_up(name: str, revision: str | None) -> Path | None:
    """The snapshot of a model in the Hub's cache, which HF_HUB_CACHE and HF_HOME name; None if it has none."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # LocalEntryNotFoundError, HFValidationError
        return None
