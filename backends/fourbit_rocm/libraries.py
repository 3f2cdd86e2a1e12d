"""Which ROCm libraries to use: those that torch has loaded, so that no second HIP runtime enters the process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_lock = threading.Lock()
_prepared = False


def mapped_libraries(lines: Iterable[str], name: str) -> list[Path]:
    """The files called `name`* among the lines of /proc/self/maps, each once."""
    found = (Path(line.split(maxsplit=5)[5].strip()) for line in lines if f"/{name}" in line)
    return list(dict.fromkeys(path for path in found if path.name.startswith(name)))


def loaded(name: str) -> list[Path]:
    """The files of this process whose names start with `name`, such as "libamdhip64.so". Empty where not Linux."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            return mapped_libraries(maps, name)
    except OSError:
        return []


def rocm_path(runtime: Path | None, torch_folder: Path, environment: str | None) -> str | None:
    """What ROCM_PATH has to be for hip-python to take the libraries that torch uses; None: leave it.

    hip-python opens $ROCM_PATH/lib/libamdhip64.so by its absolute path. `runtime` is the HIP runtime that is
    loaded already, if one is; `torch_folder` is the folder of torch's package, whose lib/ holds the libraries
    of a wheel; `environment` is ROCM_PATH as the user set it.
    """
    if runtime is not None and runtime.parent.name == "lib" and (runtime.parent / "libamdhip64.so").exists():
        return str(runtime.parent.parent)
    if runtime is None and (torch_folder / "lib" / "libamdhip64.so").exists():
        return str(torch_folder)
    return environment


def hip_python_version() -> str:
    """The version of the distribution hip-python. Raises ImportError if it is not installed."""
    from importlib.metadata import version

    return version("hip-python")


def remedy() -> str:
    """What hip-python, by its version, goes by to find the HIP libraries, and what to do so that it finds torch's."""
    import torch

    version, runtimes = hip_python_version(), loaded("libamdhip64.so")
    folder = runtimes[0].parent if runtimes else Path(torch.__file__).parent / "lib"
    if int(version.split(".")[0]) < 10:
        return (
            f"hip-python {version} ignores ROCM_PATH and finds the libraries through LD_LIBRARY_PATH alone: run"
            f" pip install 'hip-python>=10', or start Python with LD_LIBRARY_PATH={folder}"
        )
    return (
        f"hip-python {version} takes the libraries from the package rocm-sdk-core where that is installed, else from"
        " ROCM_PATH: set it to the folder whose lib/ holds libamdhip64.so and libhiprtc.so as torch uses them"
        f" ({folder})"
    )


def prepare() -> None:
    """Point ROCM_PATH at torch's libraries. Raises RuntimeError if two HIP runtimes are loaded already."""
    import torch

    runtimes = loaded("libamdhip64.so")
    if len(runtimes) > 1:
        raise RuntimeError(
            f"two HIP runtimes are loaded ({', '.join(map(str, runtimes))}), and a kernel's pointers would belong to"
            " one of them only: unset ROCM_PATH and LD_LIBRARY_PATH, or import fourbit before what loads the other"
        )
    wanted = rocm_path(runtimes[0] if runtimes else None, Path(torch.__file__).parent, os.environ.get("ROCM_PATH"))
    if wanted is not None:
        os.environ["ROCM_PATH"] = wanted


def _modules() -> tuple[Any, Any]:
    # submodules in hip-python 7 and attributes in 10; as Any, since their functions have no types
    package: Any = __import__("hip", fromlist=("hip", "hiprtc"))
    return package.hip, package.hiprtc


def bindings() -> tuple[Any, Any]:
    """hip-python's modules `(hip, hiprtc)` over torch's libraries. Raises ImportError and RuntimeError."""
    global _prepared
    if _prepared:
        return _modules()
    with _lock:
        before = os.environ.get("ROCM_PATH")
        prepare()
        try:
            hip, hiprtc = _modules()
            hip.hipRuntimeGetVersion()  # opens the libraries: hip-python is lazy
            hiprtc.hiprtcVersion()
        finally:
            if before is None:
                os.environ.pop("ROCM_PATH", None)
            else:
                os.environ["ROCM_PATH"] = before
        runtimes = loaded("libamdhip64.so")
        if len({path.resolve() for path in runtimes}) > 1:
            raise RuntimeError(
                f"hip-python loaded a second HIP runtime ({', '.join(map(str, runtimes))}), and a kernel's pointers"
                " would belong to one of them only"
            )
        _prepared = True
    return hip, hiprtc


def hip_version() -> tuple[int, int]:
    """The HIP runtime's version, whose hipRTC is of the same release. Needs no GPU."""
    hip, _ = bindings()
    error, number = hip.hipRuntimeGetVersion()
    if int(error):
        raise RuntimeError(f"hipRuntimeGetVersion: error {int(error)}")
    return int(number) // 10_000_000, int(number) // 100_000 % 100


def version_text() -> str:
    """The HIP release as "6.4"."""
    return ".".join(map(str, hip_version()))


def hip_build() -> int:
    """The HIP runtime's full version number, which names one build."""
    hip, _ = bindings()
    return int(hip.hipRuntimeGetVersion()[1])
