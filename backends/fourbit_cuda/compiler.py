"""NVRTC through cuda-python: a KernelSpec to machine code for one GPU, or to PTX where it is newer than NVRTC."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fourbit import jit
from fourbit_gpu.program import program
from fourbit_gpu.spec import KernelSpec

OPTIONS = ("-std=c++17",)
"""Beside the arch and the spec's own. Contraction stays on: where bits matter the kernels use mul_rn and add_rn."""


class CompileError(RuntimeError):
    """NVRTC rejected a kernel; the message has the kernel's name, the options and the compiler's log.

    Attributes:
        kernel: the spec's label.
        options: the compiler's options.
        log: its output.
    """

    def __init__(self, kernel: str, reason: str, options: tuple[str, ...], log: str) -> None:
        super().__init__(f"kernel {kernel} does not compile: {reason}\noptions: {' '.join(options)}\n{log}".rstrip())
        self.kernel, self.options, self.log = kernel, options, log


@dataclass(frozen=True)
class Target:
    """What to compile for.

    Attributes:
        option: as `--gpu-architecture` wants it: sm_90, sm_90a, or compute_90 for PTX.
        arch: the compute capability times ten that `option` names.
        is_ptx: whether the driver has to finish the job.
    """

    option: str
    arch: int
    is_ptx: bool


@lru_cache(maxsize=1)
def version() -> tuple[int, int]:
    """NVRTC's version. Raises RuntimeError if it cannot be loaded."""
    from fourbit_cuda import nvrtc_library

    return nvrtc_library.version()


@lru_cache(maxsize=1)
def known_archs() -> tuple[int, ...]:
    """Compute capabilities times ten that this NVRTC compiles for, ascending."""
    from fourbit_cuda import nvrtc_library

    return nvrtc_library.known_archs()


def target(arch: int, arch_specific: bool = False, known: tuple[int, ...] | None = None) -> Target:
    """How to compile for a GPU of compute capability `arch` / 10.

    Machine code if NVRTC knows the arch; else PTX for the newest arch that it knows below, from which the
    driver makes machine code. Raises RuntimeError if there is neither.
    """
    known = known_archs() if known is None else known
    if arch in known:
        return Target(f"sm_{arch}{'a' if arch_specific else ''}", arch, False)
    older = [each for each in known if each < arch]
    if not older or arch_specific:
        what = f"sm_{arch}a" if arch_specific else f"sm_{arch}"
        raise RuntimeError(
            f"NVRTC {version_text()} does not compile for {what}, only for {', '.join(map(str, known))};"
            " install another nvidia-cuda-nvrtc"
        )
    return Target(f"compute_{older[-1]}", older[-1], True)


def version_text() -> str:
    """NVRTC's version as "13.0"."""
    return ".".join(map(str, version()))


def options_for(spec: KernelSpec, where: Target) -> tuple[str, ...]:
    """All options of a compilation. FB_ARCH is 900 for arch 90, as __CUDA_ARCH__ is in device code."""
    return (f"--gpu-architecture={where.option}", *OPTIONS, f"-DFB_ARCH={where.arch * 10}", *spec.options)


def compiled(spec: KernelSpec, arch: int) -> tuple[bytes, Target]:
    """The code of `spec` for a GPU of compute capability `arch` / 10, from the cache or from NVRTC."""
    where = target(arch, spec.arch_specific)
    options = options_for(spec, where)
    text, headers = program(spec.source)
    name = jit.key(
        kind="nvrtc", version=version_text(), options=list(options), source=text, headers=headers, kernel=spec.name
    )
    return jit.cached(name, lambda: compile_source(spec, text, headers, options, where.is_ptx)), where


def compile_source(
    spec: KernelSpec, text: str, headers: dict[str, str], options: tuple[str, ...], is_ptx: bool
) -> bytes:
    """Run NVRTC: a cubin, or PTX. Raises CompileError."""
    from cuda.bindings import nvrtc

    error, handle = nvrtc.nvrtcCreateProgram(
        *(text.encode(), spec.source.encode(), len(headers)),
        *([each.encode() for each in headers.values()], [name.encode() for name in headers]),
    )
    if int(error):
        raise CompileError(spec.label(), _name(error), options, "")
    try:
        (error,) = nvrtc.nvrtcCompileProgram(handle, len(options), [option.encode() for option in options])
        if int(error):
            raise CompileError(spec.label(), _reason(error), options, _log(handle))
        size, get = (
            (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX) if is_ptx else (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        )
        error, count = size(handle)
        code = bytearray(count)
        if not int(error):
            (error,) = get(handle, code)
        if int(error):
            raise CompileError(spec.label(), _name(error), options, _log(handle))
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(handle)


def _log(handle: Any) -> str:
    from cuda.bindings import nvrtc

    error, size = nvrtc.nvrtcGetProgramLogSize(handle)
    if int(error):
        return ""
    log = bytearray(size)
    nvrtc.nvrtcGetProgramLog(handle, log)
    return log.rstrip(b"\0").decode(errors="replace").strip()


def _reason(error: Any) -> str:
    name = _name(error)
    if "BUILTIN" in name:
        return f"{name} (libnvrtc and libnvrtc-builtins must lie in one folder and have one version)"
    return name


def _name(error: Any) -> str:
    """The name of an nvrtcResult."""
    return str(getattr(error, "name", error))
