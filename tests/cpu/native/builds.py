"""How server.cpp is built and run: plain, with sanitizers, and for 64-bit ARM under an emulator."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock

from tests.support import skip_or_fail

SOURCE = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")


@dataclass(frozen=True)
class Build:
    """A way of building: CMake's definitions, what has to be installed, and what the program runs under."""

    definitions: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    emulator: tuple[str, ...] = ()


BUILDS = {
    "plain": Build(("-DFOURBIT_WERROR=ON",)),
    "clang": Build(("-DFOURBIT_WERROR=ON", "-DCMAKE_CXX_COMPILER=clang++"), ("clang++",)),
    "sanitized": Build(("-DFOURBIT_SANITIZE=address,undefined",)),
    "threads": Build(("-DFOURBIT_SANITIZE=thread",)),
    "arm64": Build(
        (
            *("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"),
            *("-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++", "-DFOURBIT_STATIC=ON", "-DFOURBIT_WERROR=ON"),
        ),
        ("aarch64-linux-gnu-g++", "qemu-aarch64"),
        ("qemu-aarch64",),
    ),
}

VARIANTS = tuple(
    [
        *(("plain", isa) for isa in (("avx512_bf16", "avx512", "avx2") if X86 else ("neon",))),
        ("plain", "scalar"),
        ("clang", "avx512_bf16" if X86 else "neon"),
        *(("sanitized", isa) for isa in (("avx512_bf16", "avx512", "avx2") if X86 else ("neon",))),
        ("sanitized", "scalar"),
        *([("arm64", "neon")] if X86 else []),
    ]
)
"""(build, instruction set) of every set that this architecture, or the emulator, has."""


def server_command(name: str, folder: Path) -> list[str]:
    """The command of build `name`, made in `folder` unless it is there. Skips where something is missing."""
    build = BUILDS[name]
    if platform.system() != "Linux":
        skip_or_fail("the server of tests/cpu/native is written for Linux")
    compiler = () if build.needs else (os.environ.get("CXX", "c++"),)
    for tool in ("cmake", *compiler, *build.needs):
        if shutil.which(tool) is None:
            skip_or_fail(f"{tool}, which tests/cpu/native needs, is not installed")
    program = folder / name / "server"
    with FileLock(folder / f"{name}.lock"):
        if not program.exists():
            generator = ["-G", "Ninja"] if shutil.which("ninja") else []
            _run(
                "cmake", "-S", SOURCE, "-B", folder / name, "-DCMAKE_BUILD_TYPE=Release", *generator, *build.definitions
            )
            _run("cmake", "--build", folder / name, "--parallel", str(os.cpu_count() or 1))
    return [*build.emulator, str(program)]


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-8000:]}{done.stderr[-8000:]}"


@cache
def instruction_sets(command: tuple[str, ...]) -> tuple[str, ...]:
    """Those that the server finds on this processor (or the emulated one), the best first."""
    done = subprocess.run([*command, "--list"], capture_output=True, text=True, check=True, timeout=60)
    return tuple(done.stdout.split())
