"""Thousands of broken checkpoint folders: each is refused with a clear error, or read as what it is.

For every folder: it is opened, inspected, read, quantized or dequantized, and compared with itself. Required is
- only the documented errors, in text that does not speak of memory; no crash, no hang, no large allocation;
- nothing changed beside the destination, and no destination unless it is complete;
- no silent success: what is accepted, the strict reader in oracle.py accepts too, with the same names, types,
  shapes and values, bit for bit. So whatever is accepted is a valid folder that says something else. (Without a
  manifest nobody can know that a flipped bit of the data, or of a name, was not meant.)

A plain run takes 900 folders, `pytest --long` 20,700 more; FOURBIT_FUZZ_CASES sets how many, FOURBIT_FUZZ_SECONDS goes
on for so long.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import fourbit
from fourbit.checkpoint import Checkpoint, CheckpointError
from fourbit.checkpoint.compare import compare_checkpoints
from fourbit.checkpoint.dequantize import dequantize_checkpoint
from fourbit.checkpoint.inspect import inspect_checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.verify import verify_checkpoint
from tests.core.fuzz import guards, material, mutations, oracle

MANY = int(os.environ.get("FOURBIT_FUZZ_CASES", "20700"))
SECONDS = float(os.environ.get("FOURBIT_FUZZ_SECONDS", "0"))
DOCUMENTED = (CheckpointError, fourbit.NonFiniteError)
CONFIG = fourbit.QuantConfig(blocksize=32, double_quant=True)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a stranger's file beside the checkpoint; nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    (tmp_path / "case" / "outside").mkdir(parents=True)
    secret = material.build({"secret": ("U8", [4], b"abcd")})
    (tmp_path / "case" / "outside" / "secret.safetensors").write_bytes(secret)
    return tmp_path


def each(cases: int) -> int:
    """Of so many cases in all, those of one family."""
    return -(-cases // len(mutations.FAMILIES))


how_many = pytest.mark.parametrize("cases", [900, pytest.param(MANY, marks=pytest.mark.long)])


@how_many
@pytest.mark.parametrize("family", mutations.FAMILIES)
def test_mutated(place, family, cases):
    material.bases()
    for name in material.bases():  # whatever is loaded or compiled once is there before memory is measured
        assert check(place, material.Case(dict(material.bases()[name]), f"sound {name}"), name) == "accepted"
    outcomes: Counter[str] = Counter()
    begin, number = time.monotonic(), 0
    with guards.limited_memory():
        while number < each(cases) or (cases == MANY and time.monotonic() - begin < SECONDS / len(mutations.FAMILIES)):
            outcomes[check(place, mutations.mutate(family, number), f"{family} {number}")] += 1
            number += 1
    print(f"{family}: {number} cases, {dict(outcomes)}")
    assert outcomes["refused"] > number // 4, outcomes


@how_many
def test_with_manifest_nothing_passes(place, cases):
    """Of a folder with a manifest any file is broken anywhere: it verifies only if it says the same as before."""
    sound, folder = place / "sound", place / "broken"
    write(material.Case(dict(material.bases()["plain-shards"])), place / "src")
    quantize_checkpoint(place / "src", sound, CONFIG, max_shard_size=1500)
    files = {path.name: path.read_bytes() for path in sound.iterdir()}
    want, ok = oracle.contents(sound), 0
    assert verify_checkpoint(sound).ok and len(files) > 4
    for number in range(each(cases)):
        rng = random.Random(number)
        name = rng.choice(sorted(files))
        data = material.garble(rng, files[name])
        if data == files[name]:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        write(material.Case({**files, name: data}), folder)
        what = f"case {number}: {name} broken"
        with guards.no_hang(place / "running", what):
            if verify_checkpoint(folder).ok:
                ok += 1
                assert oracle.contents(folder) == want, what
                others = {n: (folder / n).read_bytes() for n in ("config.json", "tokenizer.json")}
                assert others == {n: files[n] for n in others}, what
    print(f"{ok} of {each(cases)} verify, and say the same")
    assert ok < each(cases) // 10


def check(place: Path, case: material.Case, label: str) -> str:
    """One folder through every function; "accepted" or "refused"."""
    what = f"case {label}: {case.what}"
    root = place / "case"
    src = root / "src"
    shutil.rmtree(src, ignore_errors=True)
    write(case, src)
    before = guards.snapshot(root)
    with guards.no_hang(place / "running", what):
        try:
            outcome = run(src, root, what)
        except AssertionError:
            raise
        except BaseException as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert guards.snapshot(root) == before, f"{what}: something else was written"
    return outcome


def write(case: material.Case, folder: Path) -> None:
    """The folder on disk."""
    folder.mkdir()
    for name, data in case.files.items():
        (folder / name).write_bytes(data)
    for name, target in case.links.items():
        (folder / name).symlink_to(target)
    for name in case.pipes:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    for name in case.folders:
        (folder / name).mkdir()


def run(src: Path, root: Path, what: str) -> str:
    """Every function on one folder, each result held against the oracle's."""
    found = attempt(what, lambda: read(src))
    try:
        want = oracle.contents(src)
    except (oracle.Refused, OSError) as error:
        assert found is None, f"{what}: accepted, and the strict reader says: {error}"
        want = None
    if found is not None:
        assert {n: t[:2] for n, t in found.items()} == {n: t[:2] for n, t in want.items()}, what
        for name in found:
            assert same(found[name], want[name]), f"{what}: {name} is read as something else"
    listed = attempt(what, lambda: inspect_checkpoint(src))
    assert (listed is None) or want is None or {t.name for t in listed.tensors} == set(want), what
    compared = attempt(what, lambda: compare_checkpoints(src, src))
    assert compared is None or found is not None, f"{what}: compared, and cannot be read"
    checked = verify_checkpoint(src)
    assert not checked.ok or found is not None, f"{what}: verified, and cannot be read"
    converted = False
    for action in (quantize_checkpoint, dequantize_checkpoint):
        out = root / "out"
        done = attempt(what, lambda action=action, out=out: convert(action, src, out))
        assert (done is not None) == out.exists(), f"{what}: {action.__name__} left half of it"
        if done is not None:
            converted = True
            assert want is not None, f"{what}: {action.__name__} of what cannot be read"
            follow(oracle.contents(out), want, f"{what}: {action.__name__}")
            shutil.rmtree(out)
    return "accepted" if converted else "refused"


def attempt(what, action):
    """The result, or None if it was refused as documented."""
    try:
        return action()
    except DOCUMENTED as error:
        text = str(error)
        assert text and len(text) < 3000, f"{what}: {text[:200]}"
        assert "allocat" not in text and "memory" not in text, f"{what}: {text}"
        return None


def convert(action, src: Path, out: Path):
    """Quantize or dequantize."""
    return action(src, out, CONFIG) if action is quantize_checkpoint else action(src, out)


def read(src: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Everything in a folder, in the oracle's form."""
    found = {}
    with Checkpoint(src) as checkpoint:
        for name in checkpoint.entries.keys() - checkpoint.companions():
            if name in checkpoint.quantized():
                packed, state = checkpoint.read_4bit(name)
                values = fourbit.dequantize_4bit(packed, state, dtype=torch.float32)
                kind = f"{state.quant_type}:{str(state.dtype)[6:]}"
                found[name] = (kind, tuple(state.shape), values.numpy().tobytes())
            else:
                tensor = checkpoint.read(name)
                dtype = next(k for k, v in _dtypes().items() if v == str(tensor.dtype)[6:])
                found[name] = (dtype, tuple(tensor.shape), raw(tensor))
    return found


def _dtypes() -> dict[str, str]:
    kinds = {f"{a}{n}": f"{b}{n}" for a, b in (("I", "int"), ("U", "uint")) for n in (8, 16, 32, 64)}
    kinds |= {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
    kinds |= {"C64": "complex64", "F8_E8M0": "float8_e8m0fnu"}
    return (
        kinds
        | {f"F8_{k}": f"float8_{k.lower()}" for k in ("E4M3FNUZ", "E5M2FNUZ", "E5M2")}
        | {"F8_E4M3": "float8_e4m3fn"}
    )


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(a: tuple, b: tuple) -> bool:
    """Equal in every bit; a NaN of a 4-bit weight may have any."""
    if a[2] == b[2]:
        return True
    if ":" not in a[0] or len(a[2]) != len(b[2]):
        return False
    return np.array_equal(np.frombuffer(a[2], "<f4"), np.frombuffer(b[2], "<f4"), equal_nan=True)


def follow(out: dict, source: dict, what: str) -> None:
    """The result is what the source says: plain tensors the same bytes, others within the error of 4 bits."""
    assert {n: t[1] for n, t in out.items()} == {n: t[1] for n, t in source.items()}, what
    for name, (kind, shape, data) in out.items():
        kind_before, _, data_before = source[name]
        if kind == kind_before:
            assert data == data_before, f"{what}: {name}"
            continue
        a, b = values(kind_before, data_before), values(kind, data)
        if ":" in kind_before:  # dequantized: rounded once, no more
            assert kind == {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[kind_before.partition(":")[2]]
            rounded = torch.tensor(a).to(getattr(torch, kind_before.partition(":")[2])).float().numpy()
            assert np.array_equal(b, rounded), f"{what}: {name}"
        else:
            with np.errstate(over="ignore"):
                assert np.abs(a - b).max() <= 0.2 * np.abs(a).max() + 1e-30, f"{what}: {name} {shape}"


def values(kind: str, data: bytes) -> np.ndarray:
    """As float32."""
    if kind == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, "<f2" if kind == "F16" else "<f4").astype("<f4")


def test_same_number_same_case():
    for family in mutations.FAMILIES:
        assert mutations.mutate(family, 7) == mutations.mutate(family, 7)
