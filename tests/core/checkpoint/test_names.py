"""Names and kinds of files in a source: any that the new folder can have, and no surprise at the end of a run."""

from __future__ import annotations

import os

import pytest

from fourbit.checkpoint import CheckpointError, build
from fourbit.checkpoint.dequantize import dequantize_checkpoint
from fourbit.checkpoint.inspect import inspect_checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.verify import verify_checkpoint

SHARD_BYTES = 9000


NAMES = (
    "config.json.tmp",
    "fourbit_manifest.json.tmp",
    "model.safetensors.tmp",
    "model-00001-of-00003.safetensors.tmp",
)


@pytest.mark.parametrize("shard_bytes", (10**9, SHARD_BYTES))
def test_names_that_were_once_temporary(src, tmp_path, shard_bytes):
    for name in (*NAMES, "sub/config.json", "sub/config.json.tmp"):
        (src / name).parent.mkdir(exist_ok=True)
        (src / name).write_text(name)
    report = quantize_checkpoint(src, tmp_path / "dst", max_shard_size=shard_bytes)
    for name in report.copied:
        assert (tmp_path / "dst" / name).read_bytes() == (src / name).read_bytes()
    assert set(NAMES) < set(report.copied) and verify_checkpoint(tmp_path / "dst").ok


@pytest.mark.skipif(os.name == "nt", reason="other limits")
def test_the_longest_name(src, tmp_path):
    (src / ("x" * 255)).write_text("x")
    assert "x" * 255 in quantize_checkpoint(src, tmp_path / "dst").copied
    assert verify_checkpoint(tmp_path / "dst").ok


@pytest.mark.parametrize("name", ("fourbit_manifest.json/a", "a:b", "a\\b", "model.safetensors/a"))
@pytest.mark.skipif(os.name == "nt", reason="POSIX names")
def test_names_that_cannot_be_had(src, tmp_path, monkeypatch, name):
    """Found before any work is done."""
    os.rename(src / "model.safetensors", src / "weights.safetensors")
    (src / name).parent.mkdir(exist_ok=True)
    (src / name).write_text("")
    monkeypatch.setattr(build, "_write_weights", lambda *_: pytest.fail("too late"))
    with pytest.raises(CheckpointError, match="cannot be copied|is no file, or a link"):
        quantize_checkpoint(src, tmp_path / "dst")
    assert os.listdir(tmp_path) == ["src"]


def dangling(path):
    path.symlink_to("nowhere")


def pipe(path):
    os.mkfifo(path)


def folder(path):
    path.mkdir()


@pytest.mark.parametrize("make", (dangling, pipe, folder), ids=lambda f: f.__name__)
@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
def test_config_that_is_no_file(src, tmp_path, make):
    """Not the same as none: everything that reads the folder says so, and does not wait for a pipe."""
    quantize_checkpoint(src, tmp_path / "packed")
    for path in (src, tmp_path / "packed"):
        (path / "config.json").unlink()
        make(path / "config.json")
    calls = (
        lambda: quantize_checkpoint(src, tmp_path / "dst"),
        lambda: quantize_checkpoint(src / "model.safetensors", tmp_path / "dst"),
        lambda: dequantize_checkpoint(tmp_path / "packed", tmp_path / "dst"),
        lambda: inspect_checkpoint(src),
    )
    for call in calls:
        with pytest.raises(CheckpointError, match="config.json is no file, or a link that leads nowhere"):
            call()
    assert any("config.json" in fault for fault in verify_checkpoint(tmp_path / "packed").faults)
    assert sorted(os.listdir(tmp_path)) == ["packed", "src"]


@pytest.mark.parametrize("name", ("model.safetensors", "model.safetensors.index.json", "fourbit_manifest.json"))
def test_other_files_that_are_none(src, tmp_path, name):
    (src / "model.safetensors").unlink()
    (src / name).symlink_to("nowhere")
    (src / "other.safetensors").write_bytes(b"")
    faults = verify_checkpoint(src).faults
    assert any(f"{name} is no file, or a link that leads nowhere" in fault for fault in faults), faults
