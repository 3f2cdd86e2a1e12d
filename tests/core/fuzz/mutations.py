"""Checkpoint folders with something wrong in them: `mutate(family, number)` gives the same one every time."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from math import prod

from tests.core.fuzz.material import (
    DTYPES,
    HUGE,
    STEM,
    Case,
    Tensors,
    bases,
    build,
    garble,
    header_of,
    junk,
    take_apart,
    with_header,
)


def _weights(rng: random.Random, names: tuple[str, ...] = ("plain", "plain-shards", "nf4", "fp4")) -> tuple[Case, str]:
    files = dict(bases()[rng.choice(names)])
    return Case(files), rng.choice([name for name in sorted(files) if name.endswith(".safetensors")])


def header_length(rng: random.Random) -> Case:
    """The eight bytes in front."""
    case, name = _weights(rng)
    data = case.files[name]
    length = int.from_bytes(data[:8], "little")
    near = length + rng.randrange(-300, 300)
    value = rng.choice(
        (near, near, length ^ (1 << rng.randrange(64)), rng.getrandbits(64), rng.choice(HUGE), len(data))
    )
    case.files[name] = (value % 2**64).to_bytes(8, "little") + data[8:]
    case.what = f"header length {value}"
    return case


def header_text(rng: random.Random) -> Case:
    """Bytes of the header's JSON; its length is put right or not."""
    case, name = _weights(rng)
    data = case.files[name]
    length = int.from_bytes(data[:8], "little")
    text = garble(rng, data[8 : 8 + length])
    front = (len(text) if rng.random() < 0.8 else length).to_bytes(8, "little")
    case.files[name] = front + text + data[8 + length :]
    case.what = f"header {text[:300]!r}"
    return case


def header_fields(rng: random.Random) -> Case:
    """Values in the header: dtypes, shapes, offsets, names, metadata, a name twice."""
    case, name = _weights(rng)
    header, body = header_of(case.files[name])
    names = [key for key in header if key != "__metadata__"]
    key, other = rng.choice(names), rng.choice(names)
    entry, action = header[key], rng.randrange(12)
    twice = b""
    if action == 0:
        entry["dtype"] = rng.choice((*DTYPES, junk(rng)))
    elif action == 1:
        entry["shape"] = rng.choice((junk(rng), [junk(rng)], [*entry["shape"], rng.choice(HUGE)], entry["shape"][::-1]))
    elif action == 2 and entry["shape"]:
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(HUGE)
    elif action == 3:
        entry["data_offsets"] = rng.choice((junk(rng), [junk(rng)] * 2, entry["data_offsets"][::-1], [0, len(body)]))
    elif action == 4:
        entry["data_offsets"][rng.randrange(2)] += rng.choice((-8, -4, -1, 1, 4, 8, rng.choice(HUGE)))
    elif action == 5:
        entry["data_offsets"] = header[other]["data_offsets"]
    elif action == 6:
        del entry[rng.choice(sorted(entry))]
    elif action == 7:
        header[key] = junk(rng)
    elif action == 8:
        header[
            rng.choice(
                ("../../x", "/etc/x", "", "a\0b", other, other + ".absmax", STEM + ".quant_state.bitsandbytes__nf4")
            )
        ] = header.pop(key)
    elif action == 9:
        header["__metadata__"] = rng.choice((junk(rng), {"a": junk(rng)}, {"format": "tf"}))
    elif action == 10:
        del header[key]
    else:
        changed = {**entry, rng.choice(("dtype", "shape")): rng.choice(("U8", [1], header[other]["shape"]))}
        twice = b"," + json.dumps({key: rng.choice((entry, changed, header[other]))}).encode()[1:-1]
    text = json.dumps(header).encode()
    case.files[name] = with_header(text[:-1] + twice + b"}", body)
    case.what = f"header field, action {action} on {key}: {header.get(key)}"
    return case


def tensor_data(rng: random.Random) -> Case:
    """The data cut short, made longer, or with other bytes in it; or a hole in the middle of the file."""
    case, name = _weights(rng)
    data = case.files[name]
    action, at = rng.randrange(5), rng.randrange(len(data))
    if action == 0:
        data = data[:at]
    elif action == 1:
        data += rng.randbytes(rng.choice((1, 2, 8, 5000)))
    elif action == 2:
        data = data[:at] + data[at + rng.choice((1, 8, 64)) :]
    elif action == 3:
        data = data[:at] + rng.randbytes(rng.choice((1, 8))) + data[at:]
    else:
        text = bytearray(data)
        at = rng.randrange(8 + int.from_bytes(data[:8], "little"), len(data))
        text[at] ^= 1 << rng.randrange(8)
        data = bytes(text)
    case.files[name] = data
    case.what = f"data, action {action} at {at}"
    return case


def _four_bit(rng: random.Random) -> tuple[Case, str, Tensors]:
    while True:
        case, name = _weights(rng, ("nf4", "fp4"))
        tensors = take_apart(case.files[name])
        if any("quant_state" in key for key in tensors):
            return case, name, tensors


def state_json(rng: random.Random) -> Case:
    """The quantization state's JSON: its text, and each of its fields."""
    case, name, tensors = _four_bit(rng)
    key = rng.choice([key for key in tensors if "quant_state" in key])
    text = tensors[key][2]
    meta = json.loads(text)
    action = rng.randrange(6)
    if action == 0:
        text = garble(rng, text)
    elif action == 1:
        meta[rng.choice(sorted(meta))] = junk(rng)
    elif action == 2:
        meta["shape"] = rng.choice(
            ([junk(rng)], [*meta["shape"], rng.choice(HUGE)], meta["shape"][::-1], [1] * 9, [2**31] * 4)
        )
    elif action == 3:
        meta["blocksize"] = rng.choice((0, 1, 16, 31, 33, 64, 128, 4096, 8192, 32.0, True, *HUGE))
    elif action == 4:
        del meta[rng.choice(sorted(meta))]
    else:
        field_name = rng.choice((*sorted(meta), "nested_offset", "nested_blocksize", "nested_dtype", "extra"))
        value = rng.choice((junk(rng), meta.get(field_name), 32, "fp4", "float16", "float64", 256, 3.45e38, [5, 33]))
        text = text.rstrip()[:-1] + b", " + json.dumps({field_name: value}).encode()[1:]
    if action not in (0, 5):
        text = json.dumps(meta).encode()
    tensors[key] = ("U8", [len(text)], text)
    case.files[name] = build(tensors)
    case.what = f"state JSON, action {action}: {text[:300]!r}"
    return case


def state_tensors(rng: random.Random) -> Case:
    """Sizes, types and numbers of codes, scales and tables; parts that are lost or too many."""
    case, name, tensors = _four_bit(rng)
    key = rng.choice([key for key in tensors if key.startswith("model.layers")])
    dtype, shape, data = tensors[key]
    action = rng.randrange(7)
    if action == 0:  # other sizes
        data = rng.choice((data[: len(data) // 2 // 8 * 8], data + data, data + bytes(8), b"", data[:-8]))
        shape = [len(data) // {"U8": 1}.get(dtype, 4)]
        data = data[: shape[0] * {"U8": 1}.get(dtype, 4)]
    elif action == 1:  # another type of the same bytes
        dtype, size = rng.choice((("F32", 4), ("BF16", 2), ("U8", 1), ("I8", 1), ("I32", 4), ("F64", 8)))
        data += bytes(-len(data) % size)
        shape = [len(data) // size]
    elif action == 2:
        del tensors[key]
    elif action == 3:
        key = rng.choice(
            (key + ".absmax", STEM + ".extra", STEM + ".quant_state.bitsandbytes__fp4", STEM + ".nested_absmax")
        )
    elif action == 4:
        data = rng.randbytes(len(data))
    elif action == 5 and len(data) >= 4:  # a number that is none
        at = rng.randrange(len(data) // 4) * 4
        data = (
            data[:at]
            + rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\xff", b"\0\0\0\0"))
            + data[at + 4 :]
        )
    else:
        shape = rng.choice(([1, *shape], shape[::-1], [*shape, 1], [prod(shape)]))
    if action != 2:
        tensors[key] = (dtype, shape, data)
    case.files[name] = build(tensors)
    case.what = f"state tensors, action {action} on {key}: {dtype} {shape}"
    return case


def index(rng: random.Random) -> Case:
    """The index: paths that lead out, wrong maps, wrong kinds of values, broken text, links for shards."""
    case = Case(dict(bases()[rng.choice(("plain-shards", "fp4"))]))
    file = "model.safetensors.index.json"
    value = json.loads(case.files[file])
    weight_map = value["weight_map"]
    key, shard = rng.choice(sorted(weight_map)), rng.choice(sorted(set(weight_map.values())))
    action = rng.randrange(9)
    tricks = (
        "../outside/secret.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a\0.safetensors",
        "config.json",
        "\\\\x\\y",
    )
    tricks += ("./" + shard, "sub/x.safetensors", "C:x.safetensors", "missing.safetensors", "x" * 300 + ".safetensors")
    if action == 0:
        case.files[file] = garble(rng, case.files[file])
    elif action == 1:
        weight_map[key] = rng.choice(tricks)
    elif action == 2:
        weight_map.update(dict.fromkeys(weight_map, rng.choice(tricks)))
    elif action == 3:
        weight_map[key] = junk(rng)
    elif action == 4:
        weight_map[key] = shard
    elif action == 5:
        weight_map["no.such.tensor"] = shard
    elif action == 6:
        del weight_map[key]
    elif action == 7:
        value = rng.choice((junk(rng), {"weight_map": junk(rng)}, {}, {"weight_map": {}}))
    else:
        del case.files[shard]
        target = rng.choice(
            (shard, "../outside/secret.safetensors", "nowhere", "..", "config.json", "/dev/zero", "/dev/null")
        )
        case.links[shard] = target
    if action:
        case.files[file] = json.dumps(value).encode()
    case.what = f"index, action {action}: {key} {weight_map.get(key)!r} {case.links}"
    return case


def config(rng: random.Random) -> Case:
    """config.json: broken text, and values of wrong kinds."""
    case = Case(dict(bases()[rng.choice(sorted(bases()))]))
    value = json.loads(case.files["config.json"])
    action = rng.randrange(5)
    if action == 0:
        text = garble(rng, case.files["config.json"])
    elif action == 1:
        text = rng.choice((b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, rng.randbytes(40), b"{" * 3, b'"x"'))
    elif action == 2:
        text = json.dumps({**value, "quantization_config": junk(rng)}).encode()
    elif action == 3:
        text = json.dumps({**value, "quantization_config": {"quant_method": junk(rng)}}).encode()
    else:
        key = rng.choice(("model_type", "tie_word_embeddings", "hidden_size", "torch_dtype"))
        text = json.dumps({**value, key: junk(rng)}).encode()
    case.files["config.json"] = text
    case.what = f"config, action {action}: {text[:200]!r}"
    return case


def tree(rng: random.Random) -> Case:
    """What is in the folder: empty and missing files, folders, pipes and links in the place of files."""
    case = Case(dict(bases()[rng.choice(sorted(bases()))]))
    name = rng.choice(sorted(case.files))
    action = rng.randrange(6)
    if action == 0:
        case.files[name] = rng.choice((b"", rng.randbytes(rng.randrange(1, 100)), bytes(100)))
    elif action == 1:
        del case.files[name]
    elif action == 2:
        del case.files[name]
        case.folders.append(name)
    elif action == 3:
        del case.files[name]
        case.pipes.append(name)
    elif action == 4:
        del case.files[name]
        case.links[name] = rng.choice((name, "nowhere", "..", "../outside/secret.safetensors", "/dev/zero"))
    else:
        extra = rng.choice(("model.safetensors.tmp", "x.safetensors", "manifest.json", "a.txt", "sub"))
        rng.choice((case.pipes, case.folders)).append(extra)
        if extra not in case.pipes + case.folders:
            case.files[extra] = b"x"
    case.what = f"tree, action {action} on {name}: {case.links} {case.pipes} {case.folders}"
    return case


FAMILIES: dict[str, Callable[[random.Random], Case]] = {
    f.__name__: f
    for f in (header_length, header_text, header_fields, tensor_data, state_json, state_tensors, index, config, tree)
}


def mutate(family: str, number: int) -> Case:
    """Case `number` of a family; it differs from every sound folder."""
    rng = random.Random(f"{family} {number}")
    while True:
        case = FAMILIES[family](rng)
        if case.links or case.pipes or case.folders or case.files not in bases().values():
            return case
