"""The moment in which a new folder takes the place of an old one: failures, kills, and what is left."""

from __future__ import annotations

import os

import pytest

import fourbit
from fourbit.checkpoint import CheckpointError, snapshot, staging
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.verify import verify_checkpoint
from tests.folders import contents


def fail_second_rename(monkeypatch, dst, error):
    real = os.rename

    def rename(old, new):
        if str(new) == str(dst) and str(old).endswith(staging.DATA_FOLDER):
            raise error
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)


def test_failed_rename_is_rolled_back(src, dst, want, monkeypatch):
    before = contents(dst)
    with monkeypatch.context() as patch:
        fail_second_rename(patch, dst, PermissionError(13, "Permission denied"))
        with pytest.raises(CheckpointError, match="cannot rename the finished folder .*--resume tries again"):
            quantize_checkpoint(src, dst, overwrite=True)
        assert contents(dst) == before
    report = quantize_checkpoint(src, dst, resume=True)
    assert contents(dst) == want and report.resumed_bytes == report.bytes_before


class Killed(BaseException):
    pass


@pytest.mark.parametrize("options", ({}, {"resume": True}, {"overwrite": True}), ids=str)
def test_killed_between_the_renames(src, dst, want, monkeypatch, options):
    """Nothing has the destination's name; the next run, whichever, gives the old folder its name back."""
    before = contents(dst)
    with monkeypatch.context() as patch:
        fail_second_rename(patch, dst, Killed())
        patch.setattr(staging.Stage, "_put_back", lambda self: None)  # a kill does not roll back
        with pytest.raises(Killed):
            quantize_checkpoint(src, dst, overwrite=True)
    assert not dst.exists()
    found = verify_checkpoint(dst)
    assert str(staging.unfinished_folder(dst) / "replaced") in found.faults[0]
    if not options:
        with pytest.raises(CheckpointError, match="--resume continues it"):
            quantize_checkpoint(src, dst)
        assert contents(dst) == before
        options = {"resume": True}
    quantize_checkpoint(src, dst, **options)
    assert contents(dst) == want and not staging.unfinished_folder(dst).exists()


@pytest.mark.parametrize("options", ({}, {"resume": True}, {"overwrite": True}), ids=str)
def test_killed_before_the_replaced_folder_is_removed(src, dst, want, monkeypatch, options):
    with monkeypatch.context() as patch:
        patch.setattr(staging.Stage, "remove_replaced", lambda self, replaces: None)
        patch.setattr(staging.Stage, "release", lambda self, discard: self._lock.release())
        quantize_checkpoint(src, dst, overwrite=True)
    assert contents(dst) == want and (staging.unfinished_folder(dst) / "replaced").is_dir()
    if options:
        assert quantize_checkpoint(src, dst, **options).leftovers == ()
    else:
        with pytest.raises(CheckpointError, match="exists already"):
            quantize_checkpoint(src, dst)
    assert contents(dst) == want and not staging.unfinished_folder(dst).exists()


def test_what_is_added_at_the_last_moment_is_kept_and_named(src, dst, want, monkeypatch):
    """An open folder can still be written to after the rename: what is found there then is not removed."""
    real = snapshot.remove

    def remove(old, folder):
        (folder / "letters.txt").write_text("dear")
        return real(old, folder)

    monkeypatch.setattr(snapshot, "remove", remove)
    kept = dst.with_name("dst.replaced")
    assert quantize_checkpoint(src, dst, overwrite=True).leftovers == (kept,)
    assert contents(dst) == want and contents(kept) == {"letters.txt": b"dear"}
    assert quantize_checkpoint(src, dst, fourbit.QuantConfig("fp4"), overwrite=True).leftovers == (
        dst.with_name("dst.replaced-2"),
    )
