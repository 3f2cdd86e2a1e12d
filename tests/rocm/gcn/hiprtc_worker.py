"""Compiles with another hipRTC than the one in this process: run by another dynamic linker, with its own libc.

Stands alone (nothing of fourbit is imported). Each line of standard input is a JSON object with source, name, headers
and options; each answer is a line with the code object in hexadecimal, or the compiler's log.
"""

import ctypes
import json
import sys


def compile_one(library: ctypes.CDLL, request: dict) -> dict:
    headers = request["headers"]
    count = len(headers)
    texts = (ctypes.c_char_p * max(count, 1))(*(text.encode() for text in headers.values()))
    names = (ctypes.c_char_p * max(count, 1))(*(name.encode() for name in headers))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    library.hiprtcCreateProgram(
        *(ctypes.byref(program), request["source"].encode(), request["name"].encode(), count, texts, names)
    )
    options = (ctypes.c_char_p * len(request["options"]))(*(option.encode() for option in request["options"]))
    error = library.hiprtcCompileProgram(program, len(options), options)
    if error:
        library.hiprtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value + 1)
        library.hiprtcGetProgramLog(program, log)
        return {"error": error, "log": log.value.decode(errors="replace")}
    library.hiprtcGetCodeSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    library.hiprtcGetCode(program, code)
    library.hiprtcDestroyProgram(ctypes.byref(program))
    return {"code": code.raw.hex()}


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(compile_one(library, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
