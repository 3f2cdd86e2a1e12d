"""The power goes at any moment of a run: what is there afterwards, and that the run can be resumed."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from contextlib import closing

import pytest
import torch

import fourbit
from fourbit.checkpoint import CheckpointError, output, snapshot
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.verify import verify_checkpoint
from tests.core.crash.power_cut import Disk, put
from tests.folders import contents, write_folder, write_pipeline

SHARD_BYTES = 3000

pytestmark = pytest.mark.skipif(os.name == "nt", reason="folders cannot be flushed there")


def within(tree, folder):
    """The files of a folder in a tree; None if it is not there."""
    files = {path.removeprefix(f"{folder}/"): data for path, data in tree.items() if path.startswith(f"{folder}/")}
    return {path: data for path, data in files.items() if data is not None} if folder in tree else None


def run(src, dst, **options):
    return quantize_checkpoint(src, dst, max_shard_size=SHARD_BYTES, **options)


@pytest.fixture
def src(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "SYNC_SECONDS", 0)  # each tensor is noted
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{i}.q_proj.weight": torch.randn(16, 64, generator=generator) for i in range(6)}
    src = write_folder(tmp_path / "src", {**tensors, "model.norm.weight": torch.ones(64)})
    (src / "1_Pooling").mkdir()
    (src / "1_Pooling" / "config.json").write_text("{}")
    return src


@pytest.fixture
def states_of(monkeypatch):
    """What may be left at each moment of a program, and after its end. From then on nothing is flushed any more."""

    def watch(root, program):
        with closing(Disk(root)) as disk:
            with disk.watch():
                program()
            assert disk.moments > 30
            monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of resumed runs are faster so
            return [dict(tree) for tree in disk.states], disk.now()

    return watch


@pytest.fixture
def by_content(monkeypatch):
    """A copy of a disk has other inodes and times than the disk; a file's content stands for them."""
    monkeypatch.setattr(snapshot, "_inode", lambda folder: 0)
    real = snapshot._entry

    def entry(path):
        found = real(path)
        return (*found[:1], 0) if len(found) == 2 else (found[0], 0, found[2], 0, zlib.crc32(path.read_bytes()))

    monkeypatch.setattr(snapshot, "_entry", entry)


def test_a_new_folder(src, tmp_path, states_of):
    """There is no destination, or it is whole; resuming gives the same bytes; what is said to be done stays."""
    new_folder(src, tmp_path, states_of)


def test_a_new_folder_of_several_models(tmp_path, states_of, monkeypatch):
    """The same of a pipeline, whose weight files are in subfolders."""
    monkeypatch.setattr(output, "SYNC_SECONDS", 0)
    src = write_pipeline(tmp_path / "src", layers=1)
    for name in ("scheduler", "text_encoder"):
        shutil.rmtree(src / name)
    listed = {"transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (src / "model_index.json").write_text(json.dumps(listed))
    assert len(run(src, tmp_path / "whole").files) == 4  # the vae in three
    new_folder(src, tmp_path, states_of)


def new_folder(src, tmp_path, states_of):
    run(src, tmp_path / "want")
    want = contents(tmp_path / "want")
    (root := tmp_path / "disk").mkdir()
    states, after = states_of(root, lambda: run(src, root / "new" / "dst"))
    assert len(states) > 50
    for tree in states:
        assert within(tree, "new/dst") in (None, want), "a folder that is not whole has the destination's name"
    for tree in after:
        assert within(tree, "new/dst") == want, "what was said to be done is lost"
    for tree in states:
        left = put(tree, tmp_path / "left")
        dst = left / "new" / "dst"
        run(src, dst, resume=True)
        assert contents(dst) == want and verify_checkpoint(dst).ok
        assert [path.name for path in dst.parent.iterdir()] == ["dst"]
        shutil.rmtree(left)


def test_replacing_a_folder(src, tmp_path, states_of, by_content):
    """The destination is the old model or the new one, or the old one is kept and the next run, however called,
    gives it its name back."""
    run(src, tmp_path / "want")
    run(src, tmp_path / "old", config=fourbit.QuantConfig("fp4"))
    want, old = contents(tmp_path / "want"), contents(tmp_path / "old")
    (root := tmp_path / "disk").mkdir()
    shutil.copytree(tmp_path / "old", root / "dst")
    states, after = states_of(root, lambda: run(src, root / "dst", overwrite=True))
    for tree in states:
        there, kept = within(tree, "dst"), within(tree, ".dst.unfinished/replaced")
        assert there in (old, want) or (there is None and kept == old), "the old folder is lost"
    for tree in after:
        assert within(tree, "dst") == want, "what was said to be done is lost"
    resumed = 0
    for tree in states:
        left = put(tree, tmp_path / "left")
        dst = left / "dst"
        with pytest.raises(CheckpointError, match="exists already|--resume continues"):
            run(src, dst)
        assert contents(dst) in (old, want)
        try:
            run(src, dst, resume=True)
            resumed += 1
        except CheckpointError as error:  # nothing was begun that lasted
            assert "exists already" in str(error) and contents(dst) == old
            run(src, dst, overwrite=True)
        assert contents(dst) == want and verify_checkpoint(dst).ok
        assert [path.name for path in left.iterdir()] == ["dst"]
        shutil.rmtree(left)
    assert resumed > 50


def test_an_interrupted_run_keeps_what_it_noted(src, tmp_path, states_of):
    """What the journal has of a run that was interrupted is on the disk: resuming does not do it again."""
    (root := tmp_path / "disk").mkdir()
    seen = []

    def interrupt(name, done, total):
        seen.append(done)
        if len(seen) == 5:
            raise KeyboardInterrupt

    def program():
        with pytest.raises(KeyboardInterrupt):
            run(src, root / "dst", progress=interrupt)

    _, after = states_of(root, program)
    for tree in after:
        left = put(tree, tmp_path / "left")
        assert run(src, left / "dst", resume=True).resumed_bytes >= seen[-1], "what was noted is lost"
        shutil.rmtree(left)
