"""NVRTC through cuda-python: a KernelSpec to machine code for one GPU, or to PTX where it is newer than NVRTC."""

from __future__ import annotations

from typing import Any

from fourbit_cuda import libraries
from fourbit_cuda.targets import Target, target
from fourbit_gpu.compilation import RuntimeCompiler, cached
from fourbit_gpu.spec import KernelSpec

OPTIONS = ("-std=c++17",)
"""Beside the arch and the spec's own. Contraction stays on: where bits matter the kernels use mul_rn and add_rn."""


def options_for(spec: KernelSpec, where: Target) -> tuple[str, ...]:
    """All options of a compilation. FB_ARCH is 900 for arch 90, as __CUDA_ARCH__ is in device code."""
    return (f"--gpu-architecture={where.option}", *OPTIONS, f"-DFB_ARCH={where.arch * 10}", *spec.options)


def compiled(spec: KernelSpec, arch: int) -> tuple[bytes, Target]:
    """The code of `spec` for a GPU of compute capability `arch` / 10, from the cache or from NVRTC."""
    where = target(arch, spec.arch_specific)
    options = options_for(spec, where)

    def build(text: str, headers: dict[str, str]) -> bytes:
        return compile_source(spec, text, headers, options, where.is_ptx)

    return cached(spec, options, "nvrtc", libraries.version_text(), build), where


def compile_source(
    spec: KernelSpec, text: str, headers: dict[str, str], options: tuple[str, ...], is_ptx: bool
) -> bytes:
    """Run NVRTC: a cubin, or PTX. Raises CompileError."""
    from cuda.bindings import nvrtc

    return RuntimeCompiler(nvrtc, "nvrtc", _reason).compile(spec, text, headers, options, "PTX" if is_ptx else "CUBIN")


def _reason(error: Any) -> str:
    """The name of an nvrtcResult, and what to do."""
    name = str(getattr(error, "name", error))
    if "BUILTIN" in name:
        return f"{name} (libnvrtc and libnvrtc-builtins must lie in one folder and have one version)"
    return name
