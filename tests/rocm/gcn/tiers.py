"""The compilers that tests have for AMD's architectures, and which of them serves each: the tier.

- "hipRTC 5.2": Debian 12's, in this process, through the backend's own compiler.py. gfx90a and gfx1030.
- "hipRTC 6.4": Debian testing's, unpacked into a folder and run under its own dynamic linker. All architectures.
- "clang": clang and lld 19 or newer, with prelude.h in place of hipRTC's own definitions. All architectures.

`.ci/amdgpu` provides all of them.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from fourbit_gpu.compilation import CompileError
from fourbit_gpu.program import program
from fourbit_gpu.spec import KernelSpec
from fourbit_rocm import compiler, libraries
from fourbit_rocm.targets import Target
from tests.support import skip_or_fail

HIPRTC5_PLACES = ("/usr/lib/x86_64-linux-gnu/libamdhip64.so.5",)
HIPRTC6_FOLDER = "FOURBIT_HIPRTC6"
"""Environment variable: the folder into which `.ci/amdgpu` unpacked the newer hipRTC."""

OLD_ARCHS = ("gfx90a", "gfx1030")
NEW_ARCHS = ("gfx942", "gfx950", "gfx1100", "gfx1201")
ARCHS = OLD_ARCHS + NEW_ARCHS
WORKER = Path(__file__).with_name("hiprtc_worker.py")
PRELUDE = Path(__file__).with_name("prelude.h")

NEWER_HIP = (6, 4)
"""HIP version that the newer architectures are compiled with, instead of the stand-in's 5.2."""

Compile = Callable[[KernelSpec, str, dict[str, str], tuple[str, ...]], bytes]


@dataclass(frozen=True)
class Tier:
    """A compiler: `name` for people, and a function with the arguments of `compiler.compile_source`."""

    name: str
    compile: Compile

    def image(self, spec: KernelSpec, where: Target, text: str | None = None) -> bytes:
        """The code object of a kernel, or of `text` in place of its source."""
        source, headers = program(spec)
        return self.compile(spec, text or source, headers, compiler.options_for(spec, where))


def hiprtc5() -> Path:
    """Debian 12's hipRTC (a part of its libamdhip64), or skip."""
    for place in HIPRTC5_PLACES:
        if Path(place).exists():
            return Path(place)
    skip_or_fail(
        "hipRTC 5.2 is missing: run .ci/amdgpu (Debian 12: libamdhip64-5 libhiprtc-builtins5 rocm-device-libs)"
    )


@functools.lru_cache(maxsize=1)
def _worker() -> subprocess.Popen[str] | None:
    root = Path(os.environ.get(HIPRTC6_FOLDER) or Path.home() / ".cache" / "fourbit-hiprtc6")
    libraries = root / "usr" / "lib" / "x86_64-linux-gnu"
    linker, library = libraries / "ld-linux-x86-64.so.2", libraries / "libhiprtc.so.6"
    if not library.exists():
        return None
    command = [str(linker), "--library-path", str(libraries), str(Path(sys.executable).resolve()), "-I", str(WORKER)]
    worker = subprocess.Popen([*command, str(library)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(worker.communicate)  # closes its input, and it ends
    return worker


def _with_hiprtc6(spec: KernelSpec, text: str, headers: dict[str, str], options: tuple[str, ...]) -> bytes:
    worker = _worker()
    assert worker is not None and worker.stdin is not None and worker.stdout is not None
    request: dict[str, Any] = {"source": text, "name": spec.source, "headers": headers, "options": list(options)}
    worker.stdin.write(json.dumps(request) + "\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"hipRTC 6.4 died on {spec.label()} with {options} (exit status {worker.poll()})")
    answer = json.loads(line)
    if "code" not in answer:
        raise CompileError(spec.label(), f"hipRTC 6.4 error {answer['error']}", options, answer["log"])
    return bytes.fromhex(answer["code"])


@functools.lru_cache(maxsize=1)
def clang() -> str | None:
    """clang 19 or newer with its lld, or None."""
    for version in range(24, 18, -1):
        found = shutil.which(f"clang-{version}")
        if found and shutil.which(f"ld.lld-{version}"):
            return found
    return None


def _with_clang(spec: KernelSpec, text: str, headers: dict[str, str], options: tuple[str, ...]) -> bytes:
    tool = clang()
    assert tool is not None
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {spec.source: text, **headers}.items():
            (Path(folder) / name).write_text(content)
        flags = ["-x", "hip", "--cuda-device-only", "-nogpuinc", "-nogpulib", "--no-gpu-bundle-output", "-fdeclspec"]
        command = [tool, *flags, *options, "-include", str(PRELUDE), spec.source, "-o", "out.co"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(spec.label(), f"{Path(tool).name} failed", options, done.stderr)
        return (Path(folder) / "out.co").read_bytes()


HIPRTC5 = Tier("hipRTC 5.2 (Debian 12, in process)", compiler.compile_source)
HIPRTC6 = Tier("hipRTC 6.4 (Debian testing, a process of its own)", _with_hiprtc6)
CLANG = Tier("clang", _with_clang)


def available() -> list[Tier]:
    """The tiers that can compile for every architecture here, the preferred first."""
    return [*([HIPRTC6] if _worker() is not None else []), *([CLANG] if clang() else [])]


def tier_for(arch: str) -> Tier:
    """The tier for an architecture, or skip (in CI: fail) with what is missing."""
    if arch in OLD_ARCHS:
        hiprtc5()
        return HIPRTC5
    tiers = available()
    if not tiers:
        skip_or_fail(
            f"no compiler for {arch}: run .ci/amdgpu for hipRTC 6.4 in ${HIPRTC6_FOLDER}, or install clang-22 lld-22"
        )
    return tiers[0]


@contextmanager
def serving(tier: Tier) -> Iterator[None]:
    """While it lasts, the backend's compiler.py compiles, and caches, by `tier` in place of this process's hipRTC."""
    if tier is HIPRTC5:
        yield
        return
    with (
        mock.patch.object(compiler, "compile_source", tier.compile),
        mock.patch.object(libraries, "hip_version", lambda: NEWER_HIP),
        mock.patch.object(libraries, "hip_build", lambda: tier.name),
    ):
        yield
