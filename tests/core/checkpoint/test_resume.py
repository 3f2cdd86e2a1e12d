"""Interrupted runs: what is left, what is believed of it, and that the bytes come out the same."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest

import fourbit
from fourbit.checkpoint import CheckpointError, conversion, journal, output, staging
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.verify import verify_checkpoint
from tests.folders import contents, sample_tensors, write_folder

SHARD_BYTES = 9000


@pytest.fixture
def src(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "SYNC_SECONDS", 0)  # each tensor is noted
    return write_folder(tmp_path / "src", shards=2)


@pytest.fixture
def want(src, tmp_path):
    quantize_checkpoint(src, tmp_path / "want", max_shard_size=SHARD_BYTES)
    return contents(tmp_path / "want")


def interrupted(src, dst, after, **options):
    count = 0

    def interrupt(name, done, total):
        nonlocal count
        count += 1
        if count == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(src, dst, max_shard_size=SHARD_BYTES, progress=interrupt, **options)
    return staging.unfinished_folder(dst)


@pytest.mark.parametrize("after", range(1, len(sample_tensors()) + 1))
def test_resume_gives_the_same_bytes(src, want, tmp_path, after):
    dst = tmp_path / "dst"
    left = interrupted(src, dst, after)
    assert not dst.exists() and journal.read(left).hashes
    with pytest.raises(CheckpointError, match="--resume continues it, --overwrite starts afresh"):
        quantize_checkpoint(src, dst, max_shard_size=SHARD_BYTES)
    report = quantize_checkpoint(src, dst, max_shard_size=SHARD_BYTES, resume=True)
    assert report.resumed_bytes > 0 and contents(dst) == want and not left.exists()
    again = quantize_checkpoint(src, dst, max_shard_size=SHARD_BYTES, resume=True)  # finished: left as it is
    assert again.resumed_bytes == again.bytes_before and contents(dst) == want


def torn_journal(left):
    path = left / journal.JOURNAL_FILE
    path.write_bytes(path.read_bytes()[:-7])


def garbled_journal(left):
    path = left / journal.JOURNAL_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\0" * 40 + b"\n", *lines[3:]]))


def data_file(left):
    return sorted((left / staging.DATA_FOLDER).iterdir())[-1]


def shorter(left):
    with open(data_file(left), "r+b") as stream:
        stream.truncate(os.path.getsize(data_file(left)) - 5)


def longer(left):
    with open(data_file(left), "ab") as stream:
        stream.write(b"x" * 1000)


def other_bytes(left):
    path = sorted((left / staging.DATA_FOLDER).iterdir())[0]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def other_header(left):
    data = bytearray(data_file(left).read_bytes())
    data[20] ^= 1
    data_file(left).write_bytes(data)


def no_data(left):
    shutil.rmtree(left / staging.DATA_FOLDER)


def no_journal(left):
    (left / journal.JOURNAL_FILE).unlink()


DAMAGES = (torn_journal, garbled_journal, shorter, longer, other_bytes, other_header, no_data, no_journal)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_what_is_damaged_is_done_again(src, want, tmp_path, damage):
    dst = tmp_path / "dst"
    damage(interrupted(src, dst, 8))
    quantize_checkpoint(src, dst, max_shard_size=SHARD_BYTES, resume=True)
    assert contents(dst) == want and verify_checkpoint(dst).ok


def test_another_configuration(src, tmp_path):
    dst = tmp_path / "dst"
    left = interrupted(src, dst, 3)
    with pytest.raises(CheckpointError, match=r"cannot be resumed: blocksize is 32, was 64.*--overwrite"):
        quantize_checkpoint(src, dst, fourbit.QuantConfig(blocksize=32), max_shard_size=SHARD_BYTES, resume=True)
    quantize_checkpoint(src, dst, fourbit.QuantConfig(blocksize=32), overwrite=True)
    assert verify_checkpoint(dst).ok and not left.exists()
    with pytest.raises(ValueError, match="want one of them"):
        quantize_checkpoint(src, dst, overwrite=True, resume=True)


def test_source_that_changes_between_runs(src, tmp_path):
    dst = tmp_path / "dst"
    interrupted(src, dst, 3)
    os.utime(src / "model-00001-of-00002.safetensors", ns=(1, 1))
    (src / "tokenizer.json").unlink()
    (src / "new.txt").write_text("")
    with pytest.raises(CheckpointError, match="model-00001-of-00002.safetensors has changed") as failed:
        quantize_checkpoint(src, dst, max_shard_size=SHARD_BYTES, resume=True)
    assert "new.txt is new" in str(failed.value) and "tokenizer.json is gone" in str(failed.value)
    shutil.rmtree(src)
    with pytest.raises(CheckpointError, match="src does not exist"):
        quantize_checkpoint(src, dst, resume=True)


def test_source_that_changes_meanwhile(src, tmp_path):
    def touch(name, done, total):
        os.utime(src / "model-00001-of-00002.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="has changed while it was read"):
        quantize_checkpoint(src, tmp_path / "dst", progress=touch)
    assert os.listdir(tmp_path) == ["src"]


def test_source_that_vanishes_meanwhile(src, want, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    # a budget of one tensor, so that the source is still needed
    monkeypatch.setattr(conversion, "SMALL_BUDGET", 1)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        quantize_checkpoint(
            *(src, tmp_path / "dst"),
            max_shard_size=SHARD_BYTES,
            progress=lambda *step: src.exists() and os.rename(src, kept),
        )
    assert not (tmp_path / "dst").exists()
    os.rename(kept, src)
    quantize_checkpoint(src, tmp_path / "dst", max_shard_size=SHARD_BYTES, resume=True)
    assert contents(tmp_path / "dst") == want


def test_disk_that_fills(src, want, tmp_path, monkeypatch):
    before = contents(src)
    real, calls = output.Output._write, []

    def full(self, data):
        calls.append(1)
        if len(calls) == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, data)

    monkeypatch.setattr(output.Output, "_write", full)
    with pytest.raises(CheckpointError, match="No space left on device.*--resume continues once there is room"):
        quantize_checkpoint(src, tmp_path / "dst", max_shard_size=SHARD_BYTES)
    assert not (tmp_path / "dst").exists() and contents(src) == before
    report = quantize_checkpoint(src, tmp_path / "dst", max_shard_size=SHARD_BYTES, resume=True)
    assert report.resumed_bytes and contents(tmp_path / "dst") == want


def test_two_runs_at_once(src, tmp_path):
    def second(name, done, total):
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(CheckpointError, match="another run is writing"):
                quantize_checkpoint(src, tmp_path / "dst", **options)

    quantize_checkpoint(src, tmp_path / "dst", progress=second)
    assert verify_checkpoint(tmp_path / "dst").ok


def test_replacing_is_remembered(src, want, tmp_path):
    """A run with `overwrite` that was interrupted may still replace what it was to replace."""
    dst = tmp_path / "dst"
    quantize_checkpoint(src, dst, fourbit.QuantConfig("fp4"))
    before = contents(dst)
    interrupted(src, dst, 3, overwrite=True)
    assert contents(dst) == before
    quantize_checkpoint(src, dst, max_shard_size=SHARD_BYTES, resume=True)
    assert contents(dst) == want


def test_killed_after_the_rename(src, want, tmp_path, monkeypatch):
    dst = tmp_path / "dst"
    with monkeypatch.context() as patch:
        patch.setattr(staging.Stage, "release", lambda self, discard: self._lock.release())
        quantize_checkpoint(src, dst, max_shard_size=SHARD_BYTES)
    assert staging.unfinished_folder(dst).is_dir()
    quantize_checkpoint(src, dst, max_shard_size=SHARD_BYTES, resume=True)
    assert contents(dst) == want and not staging.unfinished_folder(dst).exists()


def test_manifest(src, tmp_path):
    quantize_checkpoint(src, tmp_path / "dst", max_shard_size=SHARD_BYTES)
    listing = json.loads((tmp_path / "dst" / "fourbit_manifest.json").read_text())
    assert listing["format"] == 1 and listing["fourbit"] == fourbit.__version__
    assert listing["totals"]["quantized"] == 4
    assert set(listing["files"]) == {"config.json", "model.safetensors.index.json", "tokenizer.json"}
    assert str(tmp_path) not in json.dumps(listing)
