"""From a KernelSpec to machine code: out of the cache, or by the calls that NVRTC and hipRTC have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fourbit_gpu import code_cache, program
from fourbit_gpu.spec import KernelSpec

Options = tuple[str, ...]
Build = Callable[[str, dict[str, str]], bytes]
"""From a kernel's text and its headers by name to machine code."""


class CompileError(RuntimeError):
    """A compiler rejected a kernel; the message has the kernel's name, the options and the compiler's log.

    Attributes:
        kernel: the spec's label.
        options: the compiler's options.
        log: its output.
    """

    def __init__(self, kernel: str, reason: str, options: Options, log: str) -> None:
        super().__init__(f"kernel {kernel} does not compile: {reason}\noptions: {' '.join(options)}\n{log}".rstrip())
        self.kernel, self.options, self.log = kernel, options, log


def cached(spec: KernelSpec, options: Options, kind: str, version: str, build: Build) -> bytes:
    """The code of `spec` from the user's cache, or from `build`, then stored.

    All that it depends on is in the entry's name: the whole text, headers included, the options, and the compiler's
    `kind` and `version`.
    """
    text, headers = program.program(spec)
    name = code_cache.key(
        kind=kind, version=version, options=list(options), source=text, headers=headers, kernel=spec.name
    )
    return code_cache.cached(name, lambda: build(text, headers))


@dataclass(frozen=True)
class RuntimeCompiler:
    """NVRTC or hipRTC through its Python binding.

    Attributes:
        binding: the module.
        prefix: of its functions' names: "nvrtc" or "hiprtc".
        reason: from one of its error codes to words.
        pointer: from a program's handle to what the destroying function wants.
    """

    binding: Any
    prefix: str
    reason: Callable[[Any], str]
    pointer: Callable[[Any], Any] = lambda handle: handle

    def compile(self, spec: KernelSpec, text: str, headers: dict[str, str], options: Options, result: str) -> bytes:
        """Compile, and return the `result`: "CUBIN", "PTX" or "Code". Raises CompileError."""
        error, handle = self._function("CreateProgram")(
            *(text.encode(), spec.source.encode(), len(headers)),
            *([each.encode() for each in headers.values()], [name.encode() for name in headers]),
        )
        if int(error):
            raise CompileError(spec.label(), self.reason(error), options, "")
        try:
            (error,) = self._function("CompileProgram")(handle, len(options), [option.encode() for option in options])
            code = b""
            if not int(error):
                error, code = self._bytes(f"Get{result}", handle)
            if int(error):
                _, log = self._bytes("GetProgramLog", handle)
                shown = log.rstrip(b"\0").decode(errors="replace").strip()
                raise CompileError(spec.label(), self.reason(error), options, shown)
            return code
        finally:
            self._function("DestroyProgram")(self.pointer(handle))

    def _function(self, name: str) -> Any:
        return getattr(self.binding, self.prefix + name)

    def _bytes(self, name: str, handle: Any) -> tuple[Any, bytes]:
        """The error, and what a pair of functions gives: the number of bytes, then the bytes."""
        error, size = self._function(f"{name}Size")(handle)
        found = bytearray(0 if int(error) else size)
        if found:
            (error,) = self._function(name)(handle, found)
        return error, bytes(found)
