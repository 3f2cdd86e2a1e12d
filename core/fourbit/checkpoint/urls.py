"""URLs where a path is expected: what is one, and what to do where only a path will do."""

from __future__ import annotations

import os
import re

from fourbit.checkpoint.errors import CheckpointError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/{1,3})([^/].*)", re.DOTALL)


def as_url(path: str | os.PathLike[str]) -> str | None:
    """The URL that is meant, also where `Path` has taken one of its slashes; None for a path of this machine."""
    match = _URL.fullmatch(os.fspath(path))
    if match is None or os.path.lexists(f"{match[1]}:"):
        return None
    return f"{match[1].lower()}://{'/' if match[1].lower() in ('file', 'local') else ''}{match[3]}"


def require_local(path: str | os.PathLike[str], what: str, instead: str = "") -> None:
    """Raise CheckpointError if `path` is a URL, saying what to do instead."""
    url = as_url(path)
    if url is not None:
        scheme = url.partition(":")[0]
        advice = instead or (
            f"fetch it first, such as with `python -c \"import fsspec; fsspec.filesystem('{scheme}').get('{url}',"
            " 'FOLDER', recursive=True)\"`, and name the folder"
        )
        raise CheckpointError(f"{url}: {what}; {advice}")


def refuse_destination(path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError if a new folder is to be made at a URL."""
    url = as_url(path)
    if url is not None:
        scheme = url.partition(":")[0]
        require_local(
            path,
            "a new folder is written on a disk only: storage that cannot rename a folder would show one that is not"
            " whole, and nothing there can be locked or continued",
            "write to a folder and upload that when it is finished, `fourbit_manifest.json` last, such as with"
            f" `python -c \"import fsspec; fsspec.filesystem('{scheme}').put('FOLDER/', '{url}', recursive=True)\"`,"
            " then fetch it again to `fourbit verify` it",
        )
