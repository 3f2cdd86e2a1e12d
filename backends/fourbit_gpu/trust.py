"""Whether a folder can be trusted: nobody but this user and root can have put there what is in it.

As ssh and sudo judge their files: the folder and every one above it belong to this user or to root, and no other
user may write there, unless the folder's sticky bit keeps others from renaming what is not theirs (/tmp). The group
may where it is the user's own, with nobody else in it: many systems make folders so (umask 002). Links on
the way are followed, each by the same rule; the folder itself may be none. Elsewhere than on POSIX systems nothing
is checked: there the user's profile is private.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_MOST_LINKS = 40  # as Linux


class Untrusted(Exception):
    """Why a folder or file may not be used, in words that name it."""


def check_parents(folder: Path) -> None:
    """Raise Untrusted if others can rename a folder above `folder`, OSError if one is missing."""
    if os.name == "posix":
        parent = Path(os.path.abspath(folder)).parent
        _check_way(parent, _MOST_LINKS)  # the links on the way
        _check_way(Path(os.path.realpath(parent)), 0)  # where they lead


def _check_way(folder: Path, links: int) -> None:
    """Check `folder` and all above it, from the root down."""
    here = Path(folder.anchor)
    _check_owner(here, here.lstat())
    for index, part in enumerate(folder.parts[1:], 2):
        _check_closed(here, here.lstat())
        here = here / part
        info = here.lstat()
        _check_owner(here, info)
        if stat.S_ISLNK(info.st_mode):
            if links == 0:
                raise Untrusted(f"{folder} leads through too many links")
            target = Path(os.path.normpath(here.parent.resolve() / os.readlink(here)))
            return _check_way(target.joinpath(*folder.parts[index:]), links - 1)
    _check_closed(here, here.lstat())


def _check_owner(path: Path, info: os.stat_result) -> None:
    if info.st_uid not in (os.geteuid(), 0):
        raise Untrusted(f"{path} belongs to another user (uid {info.st_uid})")


def _check_closed(path: Path, info: os.stat_result) -> None:
    mode = stat.S_IMODE(info.st_mode)
    others = 0o002 if mode & 0o020 and _is_own_group(info.st_gid) else 0o022
    if mode & others and not mode & stat.S_ISVTX:
        raise Untrusted(
            f"{path} can be written by other users (mode {mode:o}), who could put another folder in the place of one in"
            f" it; `chmod go-w {path}` ends that"
        )


def _is_own_group(gid: int) -> bool:
    """Whether a group is that of this user alone: of the same name, and without other members."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
    return group.gr_name == user and set(group.gr_mem) <= {user}


def open_private(folder: Path) -> int:
    """A descriptor of `folder`, which only this user can write; a folder of this user's is made so.

    Raises Untrusted, or OSError. For POSIX systems. The caller closes it.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError:
        raise Untrusted(f"{folder} is {'a link' if folder.is_symlink() else 'not a folder'}") from None
    except OSError as error:
        if folder.is_symlink():  # ELOOP, and other numbers elsewhere
            raise Untrusted(f"{folder} is a link") from error
        raise
    try:
        info = os.fstat(handle)
        _check_owner(folder, info)
        if info.st_uid == os.geteuid() and stat.S_IMODE(info.st_mode) & 0o077:
            os.fchmod(handle, 0o700)
            info = os.fstat(handle)
        if stat.S_IMODE(info.st_mode) & 0o022:
            raise Untrusted(f"{folder} can be written by other users (mode {stat.S_IMODE(info.st_mode):o})")
    except BaseException:
        os.close(handle)
        raise
    return handle


def read_own(name: str, folder: int) -> bytes:
    """The file `name` in the folder of that descriptor. Raises Untrusted for a link or another user's, or OSError."""
    handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with os.fdopen(handle, "rb") as file:
        info = os.fstat(handle)
        _check_owner(Path(name), info)
        if not stat.S_ISREG(info.st_mode) or stat.S_IMODE(info.st_mode) & 0o022:
            raise Untrusted(f"{name} is not a file that only this user can write")
        return file.read()
