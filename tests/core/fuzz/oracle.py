"""A strict reader of checkpoint folders in plain Python and numpy: the fuzzer's judge of what may be accepted.

It shares no code with `fourbit.checkpoint`. Whatever that accepts, this must accept too, with the same content.
"""

from __future__ import annotations

import json
import stat
from math import prod
from pathlib import Path

import numpy as np

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1} | {
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 1),
    **{"U64": 8, "U32": 4, "U16": 2, "C64": 8},
}
MARK = ".quant_state.bitsandbytes__"
TABLES = {
    "nf4": [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ],
    "fp4": [0, 0.0052083335, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
    + [-v for v in (0, 0.0052083335, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4)],
}


class Refused(Exception):
    """The folder is not one that may be read; the message says why."""


def need(condition: object, why: str) -> None:
    """Refuse unless the condition holds."""
    if not condition:
        raise Refused(why)


def parse_json(data: bytes) -> object:
    """JSON with no name twice in an object."""

    def pairs(found):
        need(len(dict(found)) == len(found), "a name twice")
        return dict(found)

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise Refused(str(error)) from None


def is_size(value: object) -> bool:
    return type(value) is int and value >= 0


def read_file(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """(dtype, shape, bytes) by name."""
    need(stat.S_ISREG(path.stat().st_mode), "no file")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    need(len(data) >= 8 and length <= len(data) - 8, "header length")
    header = parse_json(data[8 : 8 + length])
    need(isinstance(header, dict), "header is no object")
    metadata = header.pop("__metadata__", None) or {}
    need(isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()), "metadata")
    body = memoryview(data)[8 + length :]
    spans, found = [], {}
    for name, entry in header.items():
        need(isinstance(entry, dict) and set(entry) >= {"dtype", "shape", "data_offsets"}, f"{name}: fields")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        need(isinstance(dtype, str) and dtype in SIZES, f"{name}: dtype")
        need(isinstance(shape, list) and all(map(is_size, shape)), f"{name}: shape")
        need(isinstance(offsets, list) and len(offsets) == 2 and all(map(is_size, offsets)), f"{name}: offsets")
        begin, end = offsets
        need(end - begin == prod(shape) * SIZES[dtype] and end <= len(body), f"{name}: size")
        spans.append((begin, end))
        found[name] = (dtype, tuple(shape), bytes(body[begin:end]))
    at = 0
    for begin, end in sorted(spans):
        need(begin == at, "hole or overlap")
        at = end
    need(at == len(body), "data that no tensor has")
    return found


def read_folder(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """All tensors as stored."""
    if (folder / "model.safetensors").is_file():
        return read_file(folder / "model.safetensors")
    indexes = [folder / "model.safetensors.index.json"]
    if not indexes[0].is_file():
        indexes = [p for p in folder.glob("*.safetensors.index.json") if p.is_file()]
    if not indexes:
        files = [p for p in folder.glob("*.safetensors") if p.is_file()]
        need(len(files) == 1, "not one file")
        return read_file(files[0])
    need(len(indexes) == 1, "not one index")
    index = parse_json(indexes[0].read_bytes())
    need(isinstance(index, dict), "index")
    weight_map = index.get("weight_map")
    need(isinstance(weight_map, dict) and weight_map, "weight_map")
    for file in weight_map.values():
        need(isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\\0:"), "path")
        need((folder / file).is_file(), "missing shard")
    tensors = {}
    for file in sorted(set(weight_map.values())):
        for name, value in read_file(folder / file).items():
            if weight_map.get(name, file) == file:
                need(name not in tensors, f"{name} in two shards")
                tensors[name] = value
    need(set(weight_map) <= set(tensors), "a name that no shard has")
    return tensors


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Weights by name: plain ones as stored, 4-bit ones as float32 values under the type "nf4:bfloat16"."""
    tensors = read_folder(folder)
    weights = {name.partition(MARK)[0] for name in tensors if MARK in name}
    made = {name: decode(name, tensors) for name in weights}
    inner = {key for name in weights for key in tensors if is_part(key, name)}
    return {**{n: t for n, t in tensors.items() if n not in inner and n not in weights}, **made}


def is_part(key: str, weight: str) -> bool:
    return key.startswith(weight + MARK) or (MARK not in key and key.rpartition(".")[0] == weight)


def decode(name: str, tensors: dict) -> tuple[str, tuple[int, ...], bytes]:
    """A 4-bit weight, every field of its state checked."""
    need(name in tensors, f"{name} is missing")
    parts = {key[len(name) :]: t for key, t in tensors.items() if is_part(key, name)}
    marks = [key for key in parts if key.startswith(MARK)]
    need(len(marks) == 1, f"{name}: states")
    kind, shape, text = parts.pop(marks[0])
    need(kind == "U8" and len(shape) == 1, f"{name}: state's type")
    meta = parse_json(text)
    need(isinstance(meta, dict), f"{name}: no object")
    nested = "nested_offset" in meta
    fields = {"quant_type", "blocksize", "dtype", "shape"}
    fields |= {"nested_blocksize", "nested_dtype", "nested_offset"} if nested else set()
    need(set(meta) == fields, f"{name}: fields")
    quant_type, size, sizes = meta["quant_type"], meta["blocksize"], meta["shape"]
    need(isinstance(quant_type, str) and quant_type in TABLES and marks[0] == MARK + quant_type, f"{name}: quant_type")
    need(type(size) is int and size in [1 << i for i in range(5, 13)], f"{name}: blocksize")
    need(meta["dtype"] in ("float32", "bfloat16", "float16"), f"{name}: dtype")
    need(isinstance(sizes, list) and sizes and all(is_size(s) and s > 0 for s in sizes), f"{name}: shape")
    need(
        set(parts) == {".absmax", ".quant_map"} | ({".nested_absmax", ".nested_quant_map"} if nested else set()),
        "parts",
    )
    count = prod(sizes)
    blocks = -(-count // size)

    def floats(key: str, want: int) -> np.ndarray:
        need(parts[key][0] == "F32" and prod(parts[key][1]) == want, f"{name}{key}")
        return np.frombuffer(parts[key][2], "<f4")

    table = np.array(TABLES[quant_type], "f4")
    with np.errstate(all="ignore"):
        need(bool((np.abs(floats(".quant_map", 16) - table) <= 1e-6).all()), f"{name}: quant_map")
        if nested:
            need(meta["nested_blocksize"] == 256 and meta["nested_dtype"] == "float32", f"{name}: nested")
            offset = meta["nested_offset"]
            need(type(offset) in (int, float) and abs(offset) < 1e39, f"{name}: offset")
            with np.errstate(over="ignore"):
                need(bool(np.isfinite(np.float32(offset))), f"{name}: offset")
            need(parts[".absmax"][0] == "U8" and prod(parts[".absmax"][1]) == blocks, f"{name}: absmax")
            codes = np.frombuffer(parts[".absmax"][2], "u1")
            groups = np.repeat(floats(".nested_absmax", -(-blocks // 256)), 256)[:blocks]
            scales = floats(".nested_quant_map", 256)[codes] * groups + np.float32(offset)
        else:
            scales = floats(".absmax", blocks)
        stored, _, data = tensors[name]
        need(0 <= len(data) - (count + 1) // 2 < SIZES[stored], f"{name}: packed")
        packed = np.frombuffer(data, "u1")
        values = table[np.stack([packed >> 4, packed & 15], 1).reshape(-1)[:count]]
        values = values * np.repeat(scales, size)[:count]
    return f"{quant_type}:{meta['dtype']}", tuple(sizes), values.astype("<f4").tobytes()
