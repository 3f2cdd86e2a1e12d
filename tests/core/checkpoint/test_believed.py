"""What a resumed run believes: of a source that may be another by now, and of a folder that is finished."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from fourbit.checkpoint import CheckpointError, build, output, staging
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.verify import verify_checkpoint
from tests.folders import QUANTIZED, contents, write_folder

SHARD_BYTES = 9000


def run(src, dst, **options):
    return quantize_checkpoint(src, dst, max_shard_size=SHARD_BYTES, **options)


@pytest.fixture
def src(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "SYNC_SECONDS", 0)  # each tensor is noted
    return write_folder(tmp_path / "src")


def interrupted(src, dst, after=6):
    seen = []

    def interrupt(name, done, total):
        seen.append(name)
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(src, dst, progress=interrupt)


def rewrite(path, at=None):
    """Other weights, as many, with the old times: what only inode and time of change tell."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:begin])[at or QUANTIZED[0]]["data_offsets"]
    data[begin + entry[1] - 1] ^= 0x80  # a sign
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size


def copied(folder):
    """The folder as a restored backup has it: the same bytes and times in other files."""
    os.rename(folder, folder.with_name("original"))
    shutil.copytree(folder.with_name("original"), folder, copy_function=shutil.copy2)


def entries(left):
    """Tensors in the journal, first to last."""
    lines = (left / "journal.jsonl").read_text().splitlines()[1:]
    return [json.loads(line)["tensor"] for line in lines]


def test_source_rewritten_between_runs(src, tmp_path):
    dst = tmp_path / "dst"
    interrupted(src, dst)
    left = staging.unfinished_folder(dst)
    first = entries(left)[0]
    before = contents(left)
    rewrite(src / "model.safetensors", first)
    with pytest.raises(CheckpointError, match=rf"cannot be resumed: .*has changed: '{first}' is another. --overwrite"):
        run(src, dst, resume=True)
    assert not dst.exists() and contents(left)["journal.jsonl"] == before["journal.jsonl"]
    run(src, dst, overwrite=True)
    run(src, tmp_path / "want")
    assert contents(dst) == contents(tmp_path / "want")


def test_source_copied_between_runs(src, tmp_path):
    """The same bytes in other files: what is done is compared, and kept."""
    dst = tmp_path / "dst"
    interrupted(src, dst)
    copied(src)
    report = run(src, dst, resume=True)
    run(src, tmp_path / "want")
    assert contents(dst) == contents(tmp_path / "want") and report.resumed_bytes > 0


def test_unfinished_folder_moved_to_another_disk(src, tmp_path):
    dst = tmp_path / "dst"
    interrupted(src, dst)
    (there := tmp_path / "there").mkdir()
    copied(src)
    shutil.copytree(staging.unfinished_folder(dst), staging.unfinished_folder(there / "dst"))
    report = run(src, there / "dst", resume=True)
    assert verify_checkpoint(there / "dst").ok and report.resumed_bytes > 0


@pytest.mark.parametrize("changed", (True, False))
def test_source_meanwhile(src, tmp_path, changed):
    """Rewritten while it is read, its times kept, or only given another link, which changes its ctime, too."""
    calls = []

    def meanwhile(name, done, total):
        calls.append(name)
        if len(calls) == 6 and changed:
            rewrite(src / "model.safetensors", calls[0])
        elif len(calls) == 6:
            os.link(src / "model.safetensors", tmp_path / "link")

    if changed:
        with pytest.raises(CheckpointError, match=r"has changed: .* is another; what was written is removed"):
            run(src, tmp_path / "dst", progress=meanwhile)
        assert os.listdir(tmp_path) == ["src"]
    else:
        run(src, tmp_path / "dst", progress=meanwhile)
        assert run(src, tmp_path / "dst", resume=True).resumed_bytes  # the manifest has the new time
        run(src, tmp_path / "want")
        assert contents(tmp_path / "dst") == contents(tmp_path / "want")


def remove_shard(dst):
    next(iter(sorted(dst.glob("*.safetensors")))).unlink()
    return "which is missing" if (dst / "model.safetensors.index.json").exists() else "has no .safetensors file"


def flip_bit(dst):
    path = sorted(dst.glob("*.safetensors"))[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return "are not those that were written"


def cut(dst):
    path = sorted(dst.glob("*.safetensors"))[-1]
    os.truncate(path, path.stat().st_size - 1)
    return "cannot be read as safetensors"


def remove_other(dst):
    (dst / "tokenizer.json").unlink()
    return "tokenizer.json is missing"


def change_other(dst):
    (dst / "tokenizer.json").write_text("[]")
    return "tokenizer.json is not as it was written"


def plant(dst):
    (dst / "modeling_own.py").write_text("")
    return "modeling_own.py is there, and the manifest does not know it"


HARMS = (remove_shard, flip_bit, cut, remove_other, change_other, plant)


@pytest.mark.parametrize("harm", HARMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shards", (1, 3))
def test_finished_and_damaged_since(src, tmp_path, harm, shards):
    dst, size = tmp_path / "dst", {1: 10**9, 3: SHARD_BYTES}[shards]
    quantize_checkpoint(src, dst, max_shard_size=size)
    assert quantize_checkpoint(src, dst, max_shard_size=size, resume=True).resumed_bytes
    wanted = harm(dst)
    now = contents(dst)
    with pytest.raises(CheckpointError, match="finished and is damaged since: .*--overwrite writes it anew") as failed:
        quantize_checkpoint(src, dst, max_shard_size=size, resume=True)
    assert wanted in str(failed.value) and contents(dst) == now
    if harm is plant:  # which --overwrite does not remove either
        (dst / "modeling_own.py").unlink()
    quantize_checkpoint(src, dst, max_shard_size=size, overwrite=True)
    assert verify_checkpoint(dst).ok


def test_finished_with_a_broken_manifest(src, tmp_path):
    run(src, tmp_path / "dst")
    (tmp_path / "dst" / "fourbit_manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="fourbit_manifest.json is not valid JSON"):
        run(src, tmp_path / "dst", resume=True)


def test_finished_and_the_source_rewritten(src, tmp_path):
    dst = tmp_path / "dst"
    run(src, dst)
    before = contents(dst)
    rewrite(src / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"made of another source: .*{QUANTIZED[0]}.*--overwrite writes it anew"):
        run(src, dst, resume=True)
    assert contents(dst) == before


def test_finished_and_the_source_copied(src, tmp_path):
    dst = tmp_path / "dst"
    run(src, dst)
    before = contents(dst)
    copied(src)
    report = run(src, dst, resume=True)
    assert report.resumed_bytes == report.bytes_before and contents(dst) == before


def test_damaged_and_being_overwritten(src, tmp_path):
    """An interrupted run that was to replace a damaged folder is continued, not measured by that folder."""
    dst = tmp_path / "dst"
    run(src, dst)
    want = contents(dst)
    remove_shard(dst)
    seen = []

    def interrupt(name, done, total):
        seen.append(name)
        if len(seen) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(src, dst, overwrite=True, progress=interrupt)
    assert run(src, dst, resume=True).resumed_bytes and contents(dst) == want


def test_read_back(src, tmp_path, monkeypatch):
    """What is on the disk is read again before it gets its name: here one bit is another."""
    real = build._write_weights

    def flip(job, stage, *rest):
        result = real(job, stage, *rest)
        flip_bit(stage.data)
        return result

    monkeypatch.setattr(build, "_write_weights", flip)
    with pytest.raises(CheckpointError, match="reading back what was written failed: .*not those that were written"):
        run(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    monkeypatch.undo()
    run(src, tmp_path / "dst", resume=True)
    assert verify_checkpoint(tmp_path / "dst").ok
