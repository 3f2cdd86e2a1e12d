"""Tensor maps: what the copy engine of sm_90 has to know of a matrix to bring tiles of it into shared memory."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import lru_cache

MAP_BYTES = 128
_ALIGNMENT = 64
_GEOMETRY = struct.Struct("2QQ2I2I")
"""Sizes, the stride of rows in bytes, sizes of a tile, steps between its elements: of columns first."""
_UINT8, _UINT16 = 0, 1  # CUtensorMapDataType; 16-bit floats are only moved
_SWIZZLES = {64: 2, 128: 3}  # CUtensorMapSwizzle by the bytes of a tile's row
INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_PROMOTION_128 = 2  # CUtensorMapL2promotion: 256 bytes were slower

Encode = Callable[..., int]


class MapError(RuntimeError):
    """The driver does not take a matrix; the message says which."""


def encode_function(address: int, make_current: Callable[[], None]) -> Encode:
    """cuTensorMapEncodeTiled at `address`, which wants a context, as a thread of autograd's may have none yet."""
    word = ctypes.c_void_p
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, word, ctypes.c_int, ctypes.c_uint, *(word,) * 5, *(ctypes.c_int,) * 4)
    function = prototype(address)

    def encode(*args: int) -> int:
        error: int = function(*args)
        if error == INVALID_CONTEXT:
            make_current()
            error = function(*args)
        return error

    return encode


@lru_cache(maxsize=8192)
def tensor_map(
    encode: Encode, address: int, itemsize: int, columns: int, rows: int, tile_columns: int, tile_rows: int
) -> bytes:
    """The map of a contiguous matrix [rows, columns] of `itemsize` 1 or 2 bytes at `address`, 16-byte aligned.

    A tile [tile_rows, tile_columns] has rows of 64 or 128 bytes, whose 16-byte pieces come exchanged as wgmma wants
    them; what of it lies outside of the matrix comes as zeros. Raises MapError.
    """
    # one piece of memory for what is read and for the map: products with new memory for x wait for this
    memory = ctypes.create_string_buffer(_GEOMETRY.size + _ALIGNMENT + MAP_BYTES)
    _GEOMETRY.pack_into(memory, 0, columns, rows, columns * itemsize, tile_columns, tile_rows, 1, 1)
    dims = ctypes.addressof(memory)
    at = -(-(dims + _GEOMETRY.size) // _ALIGNMENT) * _ALIGNMENT
    error = encode(
        *(at, _UINT8 if itemsize == 1 else _UINT16, 2, address, dims, dims + 16, dims + 24, dims + 32),
        *(0, _SWIZZLES[tile_columns * itemsize], _PROMOTION_128, 0),
    )
    if error:
        raise MapError(
            f"cuTensorMapEncodeTiled: error {error} for a matrix [{rows}, {columns}] of {itemsize}-byte elements at"
            f" {address:#x}, tiles [{tile_rows}, {tile_columns}]"
        )
    return ctypes.string_at(at, MAP_BYTES)
