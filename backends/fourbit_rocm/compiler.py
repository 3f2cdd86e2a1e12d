"""hipRTC through hip-python: a KernelSpec to a code object for one architecture."""

from __future__ import annotations

from typing import Any

from fourbit_gpu.compilation import CompileError, RuntimeCompiler, cached
from fourbit_gpu.spec import KernelSpec
from fourbit_rocm import codeobject, libraries
from fourbit_rocm.targets import Target, check_compiler

OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=on")
"""Beside the arch and the spec's own. Contraction in one expression only, never of mul_rn and add_rn of shim.h."""


def options_for(spec: KernelSpec, where: Target) -> tuple[str, ...]:
    """All options of a compilation. The wave size is the host's to say: warpSize is no constant in newer ROCm."""
    return (
        *(f"--offload-arch={where.arch}", *OPTIONS),
        *(f"-DFB_ARCH=0x{where.number:x}", f"-DFB_WAVE={where.wave}"),
        *spec.options,
    )


def compiled(spec: KernelSpec, where: Target) -> bytes:
    """The code object of `spec` for `where`, from the cache or from hipRTC, checked by `check_code`.

    Raises UnknownArchError before a compiler that does not know the architecture is asked, and CompileError.
    """
    check_compiler(where, libraries.hip_version())
    options = options_for(spec, where)

    def build(text: str, headers: dict[str, str]) -> bytes:
        return compile_source(spec, text, headers, options)

    code = cached(spec, options, "hiprtc", str(libraries.hip_build()), build)
    check_code(spec, where, code)
    return code


def check_code(spec: KernelSpec, where: Target, code: bytes) -> codeobject.KernelInfo:
    """What the code object says of the kernel, after checking that it is what was asked for.

    Raises CompileError if it is for another architecture or wave size, or if a parameter is not eight bytes: the
    launch packs them so.
    """
    parsed = codeobject.parse(code)
    info = parsed.kernel(spec.name)
    wrong = None
    if parsed.target != where.arch:
        wrong = f"the code object is for {parsed.target}, not {where.arch}"
    elif info.wavefront_size != where.wave:
        wrong = f"compiled for waves of {info.wavefront_size} lanes, {where.arch} runs {where.wave}"
    elif any((a.size, a.offset) != (8, 8 * i) for i, a in enumerate(info.explicit_arguments)):
        wrong = f"parameters are laid out as {[(a.offset, a.size) for a in info.explicit_arguments]}, want 8 bytes each"
    if wrong:
        raise CompileError(spec.label(), wrong, options_for(spec, where), "")
    return info


def compile_source(spec: KernelSpec, text: str, headers: dict[str, str], options: tuple[str, ...]) -> bytes:
    """Run hipRTC: a code object. Raises CompileError."""
    _, hiprtc = libraries.bindings()
    rtc = RuntimeCompiler(hiprtc, "hiprtc", _reason, lambda handle: handle.createRef())
    return codeobject.unbundle(rtc.compile(spec, text, headers, options, "Code"))


def _reason(error: Any) -> str:
    """The name and number of an hiprtcResult."""
    return f"{getattr(error, 'name', error)} ({int(error)})"
