"""What mutations are made of: sound folders, files put together from parts, and garbage."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from functools import cache

import torch

import fourbit

Tensors = dict[str, tuple[str, list[int], bytes]]
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int64: "I64"}
HUGE = (-1, 0, 1, 2**31, 2**32 + 1, 2**33, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30)
JUNK = (None, True, "x", "", 1.5, -1, [], {}, [[]], "../x", 1e308, 2**70, "\ud800", "nf4", "F32", [2, "a"], [-1])
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "U8",
    "I8",
    "BOOL",
    "F8_E4M3",
    "C64",
    "F4",
    "F6_E2M3",
    "U16",
    "f32",
)
STEM = "model.layers.0.q_proj.weight"


@dataclass
class Case:
    """A folder to be written: files by name; links (name to target), pipes and folders among them."""

    files: dict[str, bytes]
    what: str = ""
    links: dict[str, str] = field(default_factory=dict)
    pipes: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)


def header_of(data: bytes) -> tuple[dict, bytes]:
    """A file's header as JSON, and its data."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(text: bytes, body: bytes) -> bytes:
    """A file of that header text and data."""
    return len(text).to_bytes(8, "little") + text + body


def build(tensors: Tensors) -> bytes:
    """A right file, as far as the tensors are."""
    header: dict = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    return with_header(text + b" " * (-len(text) % 8), body)


def take_apart(data: bytes) -> Tensors:
    """`build` backwards."""
    header, body = header_of(data)
    header.pop("__metadata__", None)
    return {n: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])]) for n, e in header.items()}


def _raw(tensor: torch.Tensor) -> tuple[str, list[int], bytes]:
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    return NAMES[tensor.dtype], list(tensor.shape), bytes(data.tolist())


@cache
def bases() -> dict[str, dict[str, bytes]]:
    """Sound folders: plain and 4-bit, in one file and in two."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(5, 33, generator=g).bfloat16()
    other = torch.randn(3, 64, generator=g)
    rest = {"model.norm.weight": _raw(torch.ones(5)), "model.count": _raw(torch.tensor(3))}
    plain = {STEM: _raw(w), "model.layers.0.k_proj.weight": _raw(other), **rest}
    small = {"config.json": b'{"model_type": "llama", "hidden_size": 33}', "tokenizer.json": b"{}"}
    found = {"plain": {"model.safetensors": build(plain), **small}}
    found["plain-shards"] = {**_sharded(plain), **small}
    for kind, double in (("nf4", True), ("fp4", False)):
        tensors: Tensors = dict(rest)
        for name, weight in ((STEM, w), ("model.layers.0.k_proj.weight", other)):
            packed, state = fourbit.quantize_4bit(weight, quant_type=kind, blocksize=32, double_quant=double)
            tensors |= {key: _raw(t) for key, t in {name: packed, **state.to_state_dict(name + ".")}.items()}
        entry = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        text = json.dumps({"model_type": "llama", "quantization_config": entry}).encode()
        files = {"model.safetensors": build(tensors)} if double else _sharded(tensors)
        found[kind] = {**files, **small, "config.json": text}
    return found


def _sharded(tensors: Tensors) -> dict[str, bytes]:
    files, weight_map = {}, {}
    for i in (0, 1):
        part = {name: t for j, (name, t) in enumerate(tensors.items()) if j % 2 == i}
        files[f"model-{i + 1:05d}-of-00002.safetensors"] = build(part)
        weight_map |= dict.fromkeys(part, f"model-{i + 1:05d}-of-00002.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    return {**files, "model.safetensors.index.json": json.dumps(index).encode()}


def garble(rng: random.Random, data: bytes) -> bytes:
    """A few bytes flipped, lost, doubled or put in; or the end cut off."""
    text = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(text)) if text else 0
        action = rng.randrange(6)
        if action == 0 and text:
            text[at] ^= 1 << rng.randrange(8)
        elif action == 1 and text:
            text[at] = rng.randrange(256)
        elif action == 2:
            del text[at : at + rng.choice((1, 1, 2, 9))]
        elif action == 3:
            text[at:at] = rng.choice(
                (b'"', b"{", b"}", b"[", b",", b"0", b"-", b"9" * 30, b"1e999", b"NaN", b"\xff", b"\0")
            )
        elif action == 4:
            text[at:at] = text[at : at + rng.randrange(1, 60)]
        else:
            del text[at:]
    return bytes(text)


def junk(rng: random.Random) -> object:
    """A value of a wrong kind, or a number at some limit."""
    return rng.choice(JUNK + HUGE)
