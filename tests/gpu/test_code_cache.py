"""The cache of compiled code: one compilation for many processes, damage, limits, folders that cannot be used."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fourbit
from fourbit_gpu import code_cache
from fourbit_gpu.code_cache import CacheWarning, DiskCache
from tests.support import skip_or_fail


@pytest.fixture
def cache(tmp_path):
    return DiskCache(tmp_path / "jit")


class Compiler:
    """A stand-in that counts."""

    def __init__(self, code=b"code"):
        self.code, self.runs = code, 0

    def __call__(self):
        self.runs += 1
        return self.code


def entry(cache, name):
    return cache.folder / f"{name}.code"


def test_compiled_once(cache):
    compiler = Compiler(bytes(range(256)) * 7)
    assert [cache.get("a", compiler) for _ in range(3)] == [compiler.code] * 3
    assert compiler.runs == 1
    assert DiskCache(cache.folder).get("a", compiler) == compiler.code and compiler.runs == 1


def test_key_tells_everything_apart():
    parts = {"kind": "nvrtc", "version": "13.0", "options": ["-a", "-b"], "headers": {"x.h": "1"}, "source": "s"}
    names = {code_cache.key(**parts)}
    for name, other in (
        *(("kind", "hiprtc"), ("version", "13.1"), ("options", ["-b", "-a"]), ("options", ["-a -b"])),
        *(("headers", {"x.h": "2"}), ("headers", {"y.h": "1"}), ("source", "t")),
    ):
        names.add(code_cache.key(**parts | {name: other}))
    assert len(names) == 8
    assert code_cache.key(**dict(reversed(parts.items()))) in names


def test_key_depends_on_the_package_version(monkeypatch):
    before = code_cache.key(source="s")
    monkeypatch.setattr(code_cache, "__version__", "0.0.0")
    assert code_cache.key(source="s") != before


@pytest.mark.parametrize("damage", ("cut", "empty", "flipped", "lengthened", "foreign"))
def test_damaged_entries_are_compiled_anew(cache, damage):
    compiler = Compiler(os.urandom(1000))
    cache.get("a", compiler)
    path = entry(cache, "a")
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-1] ^= 1
    path.write_bytes(
        {"cut": content[:-1], "empty": b"", "flipped": flipped, "lengthened": content + b"x", "foreign": b"\x7fELF"}[
            damage
        ]
    )
    assert cache.get("a", compiler) == compiler.code and compiler.runs == 2
    assert path.read_bytes() == content
    cache.get("a", compiler)
    assert compiler.runs == 2


def test_an_error_passes_through_and_is_not_kept(cache):
    def fails():
        raise RuntimeError("no such instruction")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such instruction"):
            cache.get("a", fails)
    assert cache.get("a", Compiler()) == b"code"


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_private(cache):
    cache.get("a", Compiler())
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700
    for path in cache.folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_an_open_folder_is_made_private(tmp_path):
    folder = tmp_path / "jit"
    folder.mkdir()
    folder.chmod(0o777)
    DiskCache(folder).get("a", Compiler())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_a_folder_of_another_user_is_not_trusted(tmp_path):
    """What lies in it would be executed."""
    folder = tmp_path / "jit"
    theirs = DiskCache(folder)
    theirs.get("a", Compiler(b"evil"))
    os.chown(folder, 12345, 12345)
    with pytest.warns(CacheWarning, match="belongs to another user"):
        assert DiskCache(folder).get("a", Compiler(b"mine")) == b"mine"


def test_the_least_recently_used_go(tmp_path):
    cache = DiskCache(tmp_path / "jit", limit=10_000)
    for number in range(8):
        cache.get(f"n{number}", Compiler(bytes(3000)))
        os.utime(entry(cache, f"n{number}"), (number, number))
        if number == 2:
            assert cache.get("n0", Compiler(b"")) == bytes(3000)  # used: now the youngest
    left = {path.name for path in cache.folder.glob("*.code")}
    assert {"n7.code", "n0.code"} <= left and len(left) == 3
    assert sum(path.stat().st_size for path in cache.folder.glob("*.code")) <= 10_000


def test_an_entry_over_the_limit_is_still_returned(tmp_path):
    cache = DiskCache(tmp_path / "jit", limit=10)
    assert cache.get("a", Compiler(bytes(100))) == bytes(100)
    cache.get("b", Compiler(bytes(100)))
    assert [path.name for path in cache.folder.glob("*.code")] == ["b.code"]


def test_what_crashed_processes_left_goes(cache):
    cache.get("a", Compiler())
    old, young = cache.folder / ".old.tmp", cache.folder / ".young.tmp"
    old.write_bytes(b"x"), young.write_bytes(b"x")
    before = time.time() - 2 * code_cache.STALE_SECONDS
    os.utime(old, (before, before))
    cache.get("b", Compiler())
    assert not old.exists() and young.exists()


def test_no_home(monkeypatch):
    with pytest.warns(CacheWarning, match="no home folder.*FOURBIT_CACHE_DIR"):
        cache = DiskCache(None)
    compiler = Compiler()
    assert cache.get("a", compiler) == cache.get("a", compiler) == b"code"
    assert compiler.runs == 2


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = DiskCache(tmp_path / "file" / "jit")
    with pytest.warns(CacheWarning, match="cannot be made"):
        assert cache.get("a", Compiler()) == b"code"
    assert cache.get("a", Compiler()) == b"code"  # said once


def test_a_folder_that_cannot_be_written(cache, monkeypatch):
    """Entries are read, new ones are compiled without a disk. (Permissions do not bind root, so the call fails.)"""
    cache.get("a", Compiler(b"old"))

    def refuses(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(code_cache.tempfile, "mkstemp", refuses)
    fresh = DiskCache(cache.folder)
    assert fresh.get("a", Compiler(b"new")) == b"old"
    with pytest.warns(CacheWarning, match="cannot be written: Read-only file system"):
        assert fresh.get("b", Compiler(b"new")) == b"new"


def test_locks_that_do_not_work(cache, monkeypatch):
    """On a file system without locks two processes may compile the same, and nothing else happens."""
    import filelock

    def refuses(*_, **__):
        raise NotImplementedError("no locks here")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuses)
    compiler = Compiler()
    assert cache.get("a", compiler) == cache.get("a", compiler) == b"code"
    assert compiler.runs == 1


def test_threads_compile_once(cache):
    def slow():
        compiler()
        time.sleep(0.2)
        return b"code"

    compiler = Compiler()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: cache.get("a", slow), range(8))) == [b"code"] * 8
    assert compiler.runs == 1


def test_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FOURBIT_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("FOURBIT_JIT_CACHE_MB", "3")
    cache = code_cache.default_cache()
    assert cache.folder == tmp_path / "own" / "jit" and cache.limit == 3 << 20
    assert code_cache.cached("a", Compiler()) == b"code" and (tmp_path / "own" / "jit" / "a.code").is_file()
    for wrong in ("-1", "many"):
        monkeypatch.setenv("FOURBIT_JIT_CACHE_MB", wrong)
        with pytest.raises(ValueError, match=f"FOURBIT_JIT_CACHE_MB must be a number of megabytes, got '{wrong}'"):
            code_cache.default_cache()


# Without torch, which would take most of the time: a package of that name, of which the cache takes the version.
FAKE = """
import sys, time, types
package = types.ModuleType("fourbit")
package.__path__ = [sys.argv[2]]
sys.modules["fourbit"] = package
from fourbit_gpu.code_cache import cached
def build():
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    time.sleep(0.5)
    return b"x" * 100_000
assert cached("kernel", build) == b"x" * 100_000
"""

REAL = """
import sys
from fourbit_cuda import compiler
from fourbit_gpu.elementwise import dequantize_spec
import torch
build = compiler.compile_source
def counted(*args):
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    return build(*args)
compiler.compile_source = counted
code, where = compiler.compiled(dequantize_spec(torch.bfloat16, False), 80)
assert code.startswith(b"\\x7fELF"), code[:8]
"""


@pytest.mark.long
@pytest.mark.parametrize("program", (FAKE, REAL), ids=("fake", "nvrtc"))
def test_sixteen_processes_with_a_cold_cache(program, tmp_path):
    if program is REAL:
        try:
            from fourbit_cuda import libraries

            libraries.version()
        except Exception as error:
            skip_or_fail(f"NVRTC: {error}")
    log = tmp_path / "log"
    env = os.environ | {"FOURBIT_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(log), str(Path(fourbit.__file__).parent)]
    started = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(16)]
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * 16, "\n".join(errors)
    assert log.read_text() == "built\n"
