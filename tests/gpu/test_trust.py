"""Whom the cache of compiled code trusts: code from it is executed, so nobody else may be able to put it there."""

from __future__ import annotations

import os
import stat
from types import SimpleNamespace

import pytest

from fourbit_gpu.code_cache import CacheWarning, DiskCache
from tests.support import skip_or_fail

OTHER = 12345


@pytest.fixture(autouse=True)
def posix():
    if os.name != "posix":
        skip_or_fail("owners and modes of files are checked on POSIX systems")


@pytest.fixture
def give_away(monkeypatch):
    """`give_away(path)`: it belongs to another user then. Who is not root becomes another user instead."""

    def give(path):
        if os.geteuid() == 0:
            os.chown(path, OTHER, OTHER, follow_symlinks=False)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: OTHER)

    return give


def make_group(monkeypatch, name, members):
    """Every group has that name and those members, and this user is "ada"."""
    monkeypatch.setattr("pwd.getpwuid", lambda uid: SimpleNamespace(pw_name="ada"))
    monkeypatch.setattr("grp.getgrgid", lambda gid: SimpleNamespace(gr_name=name, gr_mem=members))


@pytest.fixture
def group_of_several(monkeypatch):
    make_group(monkeypatch, "staff", ["ada", "bob"])


@pytest.fixture
def cache(tmp_path):
    """With one entry, two folders below tmp_path."""
    cache = DiskCache(tmp_path / "home" / "cache" / "jit")
    assert get(cache, b"planted") == b"planted"
    return cache


def get(cache, code=b"mine"):
    return cache.get("a", lambda: code)


def mode(path):
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("above", ("parent", "grandparent"))
@pytest.mark.parametrize("bits", (0o777, 0o775, 0o757, 0o722))
def test_a_folder_above_that_others_may_write(cache, above, bits, group_of_several):
    """Whoever may write there may put another folder in the place of the cache. Looked at anew at each call."""
    folder = cache.folder.parent if above == "parent" else cache.folder.parents[1]
    assert get(cache) == b"planted"
    folder.chmod(bits)
    with pytest.warns(CacheWarning, match=rf"{folder} can be written by other users \(mode {bits:o}\).*chmod go-w"):
        assert get(cache) == b"mine"
    assert get(cache) == b"mine"  # said once
    assert mode(folder) == bits, "it is not the cache's to change"
    folder.chmod(0o755)
    assert get(cache) == b"planted"


@pytest.mark.parametrize(
    ("name", "members", "code"),
    (("ada", [], b"planted"), ("ada", ["ada"], b"planted"), ("ada", ["bob"], b"mine"), ("staff", ["ada"], b"mine")),
)
@pytest.mark.filterwarnings("ignore::fourbit_gpu.code_cache.CacheWarning")
def test_the_users_own_group_may_write_above(cache, monkeypatch, name, members, code):
    """With umask 002, as many systems have it, ~/.cache is such a folder."""
    make_group(monkeypatch, name, members)
    cache.folder.parent.chmod(0o775)
    assert get(cache) == code
    cache.folder.parent.chmod(0o777)
    assert get(cache) == b"mine"


def test_a_user_without_a_name_has_no_group_of_its_own(cache, monkeypatch):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    cache.folder.parent.chmod(0o775)
    with pytest.warns(CacheWarning, match="can be written by other users"):
        assert get(cache) == b"mine"


def test_a_sticky_folder_above(cache):
    """As /tmp: others may write there, yet not rename what is this user's."""
    cache.folder.parent.chmod(0o1777)
    assert get(cache) == b"planted"


@pytest.mark.parametrize("level", (0, 1, 2), ids=("folder", "parent", "grandparent"))
def test_a_folder_of_another_user(cache, give_away, level):
    give_away((cache.folder, *cache.folder.parents)[level])
    with pytest.warns(CacheWarning, match=r"belongs to another user \(uid \d+\)\. Set FOURBIT_CACHE_DIR"):
        assert get(cache) == b"mine"


def test_a_link_is_not_followed_and_its_target_not_changed(tmp_path):
    target = tmp_path / "shared"
    target.mkdir(mode=0o755)
    target.chmod(0o755)
    (tmp_path / "jit").symlink_to(target)
    with pytest.warns(CacheWarning, match="jit is a link"):
        assert get(DiskCache(tmp_path / "jit")) == b"mine"
    assert mode(target) == 0o755 and not list(target.iterdir())


def test_a_dangling_link_and_a_file(tmp_path):
    (tmp_path / "jit").symlink_to(tmp_path / "nowhere")
    with pytest.warns(CacheWarning, match="jit is a link"):
        assert get(DiskCache(tmp_path / "jit")) == b"mine"
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "file").write_text("x")
    with pytest.warns(CacheWarning, match="file is not a folder"):
        assert get(DiskCache(tmp_path / "file")) == b"mine"


def test_links_on_the_way(cache, tmp_path, give_away):
    """Followed, as ~/.cache may lie on another disk; where they lead must be as closed as the rest."""
    (tmp_path / "way").symlink_to("home/cache")
    through = DiskCache(tmp_path / "way" / "jit")
    assert get(through) == b"planted"
    cache.folder.parent.chmod(0o777)
    with pytest.warns(CacheWarning, match="home/cache can be written by other users"):
        assert get(through) == b"mine"
    cache.folder.parent.chmod(0o700)
    assert get(through) == b"planted"
    give_away(tmp_path / "way")
    with pytest.warns(CacheWarning, match="belongs to another user"):
        assert get(DiskCache(tmp_path / "way" / "jit")) == b"mine"


def test_a_link_through_another_folders_parent(cache, tmp_path):
    """`a/..` is where a leads to, and one up; not the folder that a lies in."""
    (tmp_path / "open" / "sub").mkdir(parents=True)
    (tmp_path / "open" / "cache").mkdir()
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "a").symlink_to("open/sub")
    (tmp_path / "way").symlink_to("a/../cache")
    (tmp_path / "open").chmod(0o777)
    with pytest.warns(CacheWarning, match="open can be written by other users"):
        assert get(DiskCache(tmp_path / "way" / "jit")) == b"mine"


def test_a_ring_of_links(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.warns(CacheWarning):
        assert get(DiskCache(tmp_path / "a" / "jit")) == b"mine"


def test_an_entry_that_is_a_link(cache, tmp_path):
    """Not read, and replaced by one that is compiled anew."""
    entry = cache.folder / "a.code"
    entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(tmp_path / "elsewhere")
    content = (tmp_path / "elsewhere").read_bytes()
    assert get(cache) == b"mine" and not entry.is_symlink()
    assert (tmp_path / "elsewhere").read_bytes() == content


def test_an_entry_that_others_may_write(cache):
    (cache.folder / "a.code").chmod(0o666)
    assert get(cache) == b"mine"
    assert mode(cache.folder / "a.code") == 0o600 and get(cache, b"again") == b"mine"


def test_an_entry_of_another_user(cache, give_away, recwarn):
    give_away(cache.folder / "a.code")
    assert get(cache) == b"mine"


def test_an_entry_that_is_a_pipe(cache):
    """Opening one for reading must not wait for a writer."""
    (cache.folder / "a.code").unlink()
    os.mkfifo(cache.folder / "a.code", 0o600)
    assert get(cache) == b"mine"


def test_what_is_made_is_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        cache = DiskCache(tmp_path / "new" / "newer" / "jit")
        assert get(cache) == b"mine" and get(cache, b"again") == b"mine"
    finally:
        os.umask(before)
    assert [mode(folder) for folder in (cache.folder, *cache.folder.parents[:2])] == [0o700] * 3
