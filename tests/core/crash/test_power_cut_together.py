"""The power goes at any moment of a run of several processes; here threads, on one watched disk."""

from __future__ import annotations

import os
import shutil
from contextlib import closing

import pytest
import torch

from fourbit.checkpoint import output, team
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.verify import verify_checkpoint
from tests.core.checkpoint.test_together import succeeded, together
from tests.core.crash.power_cut import Disk, put
from tests.folders import contents, write_folder

SHARD_BYTES = 3000


def within(tree, folder):
    """The files of a folder in a tree; None if it is not there."""
    files = {path.removeprefix(f"{folder}/"): data for path, data in tree.items() if path.startswith(f"{folder}/")}
    return {path: data for path, data in files.items() if data is not None} if folder in tree else None


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="folders cannot be flushed there")
@pytest.mark.parametrize("size", (SHARD_BYTES, None))
def test_a_new_folder(tmp_path, monkeypatch, size):
    """There is no destination, or it is whole; resuming, by one or several, gives the same bytes."""
    monkeypatch.setattr(output, "SYNC_SECONDS", 0)
    monkeypatch.setattr(team, "POLL_SECONDS", 0.02)
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{i}.q_proj.weight": torch.randn(16, 64, generator=generator) for i in range(6)}
    src = write_folder(tmp_path / "src", {**tensors, "model.norm.weight": torch.ones(64)})
    quantize_checkpoint(src, tmp_path / "want", max_shard_size=size)
    want = contents(tmp_path / "want")
    (root := tmp_path / "disk").mkdir()
    with closing(Disk(root)) as disk:
        with disk.watch():
            succeeded(together(src, root / "new" / "dst", 2, max_shard_size=size))
        states, after = [dict(tree) for tree in disk.states], disk.now()
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    assert len(states) > 50
    for tree in states:
        assert within(tree, "new/dst") in (None, want), "a folder that is not whole has the destination's name"
    for tree in after:
        assert within(tree, "new/dst") == want, "what was said to be done is lost"
    for i, tree in enumerate(states):
        dst = put(tree, tmp_path / "left") / "new" / "dst"
        if i % 10:
            quantize_checkpoint(src, dst, max_shard_size=size, resume=True)
        else:
            succeeded(together(src, dst, 2, max_shard_size=size, resume=True))
        assert contents(dst) == want and verify_checkpoint(dst).ok
        assert [path.name for path in dst.parent.iterdir()] == ["dst"]
        shutil.rmtree(tmp_path / "left")
