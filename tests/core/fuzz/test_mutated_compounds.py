"""Broken folders of several models: one of the models is broken as in test_mutated_checkpoints, or the list of them.

The same is required of them; what is accepted is, model by model, what the strict reader in oracle.py reads there.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from fourbit.checkpoint.compare import compare_checkpoints
from fourbit.checkpoint.compound import Compound
from fourbit.checkpoint.dequantize import dequantize_checkpoint
from fourbit.checkpoint.inspect import inspect_checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.verify import verify_checkpoint
from tests.core.fuzz import guards, material, mutations, oracle
from tests.core.fuzz.test_mutated_checkpoints import attempt, convert, follow, place  # noqa: F401

FEW, MANY = 200, 2500
NAMES = (
    "../outside",
    "..",
    ".",
    "/etc",
    "a/b",
    "transformer/",
    "x" * 5000,
    "",
    "\0",
    "\ud800",
    "d/" * 3000,
    "vae/../transformer",
)
PIPELINE = {"transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
MODULES = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]


@cache
def bases() -> dict[str, tuple[str, dict[str, str]]]:
    """Sound folders: the name and text of the list of models, and a base of `material` for the folder of each."""
    modules = [{"idx": i, "path": path, "type": f"st.models.{kind}"} for i, (path, kind) in enumerate(MODULES)]
    index = {"_class_name": "FluxPipeline", **PIPELINE, "tokenizer": ["transformers", "T"], "x": [None, None]}
    found = {}
    for four in (False, True):
        first, second = ("nf4", "fp4") if four else ("plain", "plain-shards")
        found[f"pipeline {four}"] = ("model_index.json", json.dumps(index), {"transformer": first, "vae": second})
        found[f"sentences {four}"] = ("modules.json", json.dumps(modules), {"": first, "2_Dense": "plain"})
    return found


def mutate(number: int) -> tuple[str, dict[str, material.Case], str, bytes, str]:
    """The list's name, the folders, the list, and what is broken."""
    rng = random.Random(f"compound {number}")
    kind = rng.choice(sorted(bases()))
    file, text, folders = bases()[kind]
    cases = {folder: material.Case(dict(material.bases()[base])) for folder, base in folders.items()}
    data = text.encode()
    if rng.random() < 0.4:
        folder, family = rng.choice(sorted(folders)), rng.choice(sorted(mutations.FAMILIES))
        cases[folder] = mutations.mutate(family, rng.randrange(10**6))
        return file, cases, kind, data, f"{kind}: {folder!r}: {family}: {cases[folder].what}"
    action = rng.randrange(5)
    if action == 0:
        data = material.garble(rng, data)
    elif action == 1:
        data = rng.choice((b"", b"[]", b"{}", b"null", b"[" * 100_000, b"\xff\xfe", rng.randbytes(30)))
    else:
        value = json.loads(text)
        name, entry = (
            rng.choice(NAMES),
            rng.choice((material.junk(rng), [material.junk(rng)] * 2, ["diffusers", "UNet2D"])),
        )
        if isinstance(value, dict):
            value[rng.choice((name, rng.choice(sorted(value))))] = entry
        else:
            module = value[rng.randrange(len(value))]
            module[rng.choice(("path", "type"))] = rng.choice((name, material.junk(rng)))
            if rng.random() < 0.3:
                value.append(material.junk(rng))
        data = json.dumps(value).encode()
    return file, cases, kind, data, f"{kind}: {file}: {data[:200]!r}"


def write(src: Path, file: str, cases: dict[str, material.Case], data: bytes) -> None:
    """The folder on disk."""
    src.mkdir()
    (src / file).write_bytes(data)
    for folder, case in cases.items():
        here = src / folder
        here.mkdir(exist_ok=True)
        for name, content in case.files.items():
            (here / name).write_bytes(content)
        for name, target in case.links.items():
            (here / name).symlink_to(target)
        for name in case.pipes:
            (here / name).unlink(missing_ok=True)
            os.mkfifo(here / name)
        for name in case.folders:
            (here / name).mkdir()


def contents(folder: Path) -> dict:
    """Every tensor of every model that `Compound` finds, as the strict reader reads it."""
    with Compound(folder) as source:
        places = {member.prefix: member.checkpoint.folder for member in source.members.values()}
        names = set(source.entries) - source.companions()
    found = {}
    for prefix, here in places.items():
        assert os.path.realpath(here).startswith(os.path.realpath(folder)), f"{here} is not in {folder}"
        found |= {prefix + name: tensor for name, tensor in oracle.contents(here).items()}
    assert set(found) == names
    return found


def run(src: Path, root: Path, what: str) -> str:
    """Every function on one folder."""
    opened = attempt(what, lambda: Compound(src))
    listed = attempt(what, lambda: inspect_checkpoint(src))
    compared = attempt(what, lambda: compare_checkpoints(src, src))
    checked = verify_checkpoint(src)
    assert opened is not None or (listed is None and compared is None and not checked.ok), what
    outcome = "refused"
    for action in (quantize_checkpoint, dequantize_checkpoint):
        out = root / "out"
        done = attempt(what, lambda action=action, out=out: convert(action, src, out))
        assert (done is not None) == out.exists(), f"{what}: {action.__name__} left half of it"
        if done is not None:
            outcome = "accepted"
            follow(contents(out), contents(src), f"{what}: {action.__name__}")
            assert verify_checkpoint(out).ok or not checked.ok, what
            shutil.rmtree(out)
    return outcome


@pytest.mark.parametrize("cases", [FEW, pytest.param(MANY, marks=pytest.mark.long)])
def test_mutated(place, cases):  # noqa: F811
    root, outcomes = place / "case", Counter()
    src = root / "src"

    def check(what: str, *folder) -> str:
        write(src, *folder)
        before = guards.snapshot(root)
        with guards.no_hang(place / "running", what):
            try:
                outcome = run(src, root, what)
            except AssertionError:
                raise
            except BaseException as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        assert guards.snapshot(root) == before, f"{what}: something else was written"
        shutil.rmtree(src)
        return outcome

    for kind, (file, text, folders) in bases().items():
        sound = {folder: material.Case(dict(material.bases()[base])) for folder, base in folders.items()}
        assert check(f"sound {kind}", file, sound, text.encode()) == "accepted"
    with guards.limited_memory():
        for number in range(cases):
            file, broken, _, data, what = mutate(number)
            outcomes[check(f"case {number}: {what}", file, broken, data)] += 1
    print(dict(outcomes))
    assert outcomes["refused"] > cases // 4 and outcomes["accepted"] > cases // 20, outcomes
