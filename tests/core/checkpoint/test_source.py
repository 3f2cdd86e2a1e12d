"""Sources in the Hub's cache, links in strangers' folders, and what else lies there."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from fourbit.checkpoint import Checkpoint, CheckpointError, others, source, weight_files
from fourbit.checkpoint.compare import compare_checkpoints
from fourbit.checkpoint.dequantize import dequantize_checkpoint
from fourbit.checkpoint.inspect import inspect_checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.verify import verify_checkpoint
from fourbit.cli.app import app
from tests.folders import sample_tensors, write_folder

OLD, NEW = "a" * 40, "b" * 40


def into_cache(folder: Path, cache: Path, name: str, revision: str, main: bool = True) -> Path:
    """Put a model folder into a Hub cache, as huggingface_hub lays it out; the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    for place in (repository / "blobs", repository / "refs", snapshot):
        place.mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{revision[:8]}{i:032x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.join("..", "..", "blobs", blob.name))
    if main:
        (repository / "refs" / "main").write_text(revision)
    return snapshot


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "hub"


@pytest.fixture
def snapshot(tmp_path, cache):
    return into_cache(write_folder(tmp_path / "src"), cache, "org/name", NEW)


def test_a_file_in_the_hubs_cache_is_a_source_of_every_command(snapshot, tmp_path):
    file = snapshot / "model.safetensors"
    for path in (snapshot, file):
        packed, back = tmp_path / f"{path.name}.4", tmp_path / f"{path.name}.16"
        assert quantize_checkpoint(path, packed).plan.quantized
        assert json.loads((packed / "config.json").read_text())["model_type"] == "llama"
        dequantize_checkpoint(packed, back)
        assert compare_checkpoints(path, packed).errors == ()
        assert len(inspect_checkpoint(path).tensors) == len(sample_tensors())
        assert verify_checkpoint(path).ok
        for command in (["inspect", path], ["verify", path], ["estimate", path], ["compare", path, packed]):
            assert CliRunner().invoke(app, list(map(str, command))).exit_code == 0
        dry = CliRunner().invoke(app, ["quantize", str(path), str(tmp_path / "new"), "--dry-run"])
        assert dry.exit_code == 0
    quantize_checkpoint(snapshot, tmp_path / "whole")
    packed = into_cache(tmp_path / "whole", tmp_path / "hub", "org/packed", OLD)
    dequantize_checkpoint(packed / "model.safetensors", tmp_path / "file")
    assert compare_checkpoints(snapshot, tmp_path / "file").errors == ()


def test_a_source_in_the_cache_is_not_written_over(snapshot):
    for dst in (snapshot, snapshot.parent, snapshot.parent.parent):
        with pytest.raises(CheckpointError, match="the destination .* is the source, or a folder around it"):
            quantize_checkpoint(snapshot / "model.safetensors", dst, overwrite=True)
    assert (snapshot / "model.safetensors").is_symlink()


def test_the_root_of_a_repository_means_its_main_snapshot(tmp_path, cache, snapshot):
    root = snapshot.parent.parent
    into_cache(write_folder(tmp_path / "older"), cache, "org/name", OLD, main=False)
    assert source.located(root) == snapshot
    shown = CliRunner().invoke(app, ["inspect", str(root)])
    assert shown.exit_code == 0 and f"from the local Hub cache, revision {NEW} ({snapshot})" in shown.stderr
    assert quantize_checkpoint(root, tmp_path / "dst").source == snapshot
    (root / "refs" / "main").write_text("../../../src")  # no revision: nothing outside is meant
    with pytest.raises(CheckpointError, match=f"has 2 snapshots .{OLD}, {NEW}., and no refs/main; name one"):
        source.located(root)
    (root / "refs" / "main").unlink()
    (root / "snapshots" / OLD).rename(tmp_path / "gone")
    assert source.located(root) == snapshot
    (root / "snapshots" / NEW).rename(tmp_path / "gone too")
    with pytest.raises(CheckpointError, match="has no snapshot yet"):
        source.located(root)


HUB_ID = """
import socket, sys
def no_network(*a, **k): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = no_network
from fourbit.checkpoint import source, CheckpointError
for name in sys.argv[1:]:
    try: print(source.located(name))
    except CheckpointError as error: print("error:", error)
"""


def test_an_id_of_the_hub(snapshot, cache, tmp_path):
    """In a process of its own, since huggingface_hub reads its environment once; with every connection an error."""
    into_cache(tmp_path / "src", cache, "here/too", NEW)
    write_folder(tmp_path / "here" / "too")
    environment = {**os.environ, "HF_HUB_CACHE": str(cache)}
    environment.pop("HF_HUB_OFFLINE", None)
    names = ["org/name", "org/other", "org/name/more", "here/too"]
    command = [sys.executable, "-c", HUB_ID, *names]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    cached, other, path, there = done.stdout.splitlines()
    assert cached == str(snapshot)
    assert other.startswith("error: org/other does not exist, and the Hub's cache has no such model. `hf download org/")
    assert path == "org/name/more"  # no id: a path that does not exist
    assert there == "here/too"  # what is there comes first


def test_an_id_of_the_hub_without_huggingface_hub(monkeypatch):
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="is not installed; `hf download org/name"):
        source.located("org/name")
    with pytest.raises(CheckpointError, match="nothing/here/at/all does not exist"):
        Checkpoint("nothing/here/at/all")


SECRET = "root:x:0:0"


@pytest.fixture
def secret(tmp_path):
    file = tmp_path / "outside" / "secret.txt"
    file.parent.mkdir()
    file.write_text(SECRET)
    return file


def test_other_files_that_lead_outside_are_left_out_and_said(tmp_path, secret):
    src = write_folder(tmp_path / "src")
    (src / "sub").mkdir()
    (src / "notes.txt").symlink_to(secret)
    (src / "sub" / "up.txt").symlink_to("../../outside/secret.txt")
    (src / "hop.txt").symlink_to("notes.txt")
    (src / "folder").symlink_to(secret.parent)
    (src / "round").symlink_to(".")
    (src / "nowhere.txt").symlink_to("not there")
    (src / "loop.txt").symlink_to("loop.txt")
    (src / "sub" / "inside.txt").symlink_to("../tokenizer.json")
    os.mkfifo(src / "pipe.txt")
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(src)  # a socket's path may have 107 bytes only
    try:
        server.bind("socket.txt")
    finally:
        os.chdir(here)
    server.close()
    with open(src / "huge.txt", "wb") as stream:
        stream.truncate(weight_files.MAX_OTHER_BYTES + 1)
    result = CliRunner().invoke(app, ["quantize", str(src), str(tmp_path / "dst"), "--json"])
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    up = os.path.join("sub", "up.txt")
    reasons = {
        **{name: f"a link out of the folder, to {secret}" for name in ("notes.txt", up, "hop.txt")},
        "folder": f"a link to the folder {secret.parent}",
        "round": f"a link to the folder {src}",
        **dict.fromkeys(("nowhere.txt", "loop.txt"), "a link that leads nowhere"),
        **dict.fromkeys(("pipe.txt", "socket.txt"), "no file, but a pipe, socket or device"),
        "huge.txt": f"{weight_files.MAX_OTHER_BYTES + 1:,} bytes, too large for anything but weights",
    }
    assert value["skipped"] == reasons
    assert set(value["copied"]) == {"tokenizer.json", os.path.join("sub", "inside.txt")}
    shown = CliRunner().invoke(app, ["quantize", str(src), str(tmp_path / "again")], env={"COLUMNS": "1000"})
    for name, reason in reasons.items():
        assert f"not copied: {name}, {reason}" in shown.stderr
    for file in (tmp_path / "dst").rglob("*"):
        assert not file.is_symlink() and (file.is_dir() or SECRET not in file.read_text(errors="replace"))


def test_weights_in_other_forms_are_said(tmp_path):
    src = write_folder(tmp_path / "src")
    (src / "original").mkdir()
    (src / "original" / "consolidated.pth").write_bytes(b"")
    (src / "pytorch_model.bin").write_bytes(b"")
    shown = CliRunner().invoke(app, ["quantize", str(src), str(tmp_path / "dst")], env={"COLUMNS": "1000"})
    assert "not copied" in shown.stderr and "original/consolidated.pth, pytorch_model.bin" in shown.stderr


@pytest.mark.parametrize("name", ("model.safetensors", "config.json", "model.safetensors.index.json"))
@pytest.mark.parametrize("how", ("absolute", "relative", "through a folder", "through a blobs of its own"))
def test_weights_and_config_that_lead_outside_are_refused(tmp_path, name, how):
    elsewhere = write_folder(tmp_path / "elsewhere", shards=2 if "index" in name else 1)
    src = write_folder(tmp_path / "snapshots" / "src", shards=2 if "index" in name else 1)
    (src / name).unlink()
    if how == "absolute":
        (src / name).symlink_to(elsewhere / name)
    elif how == "relative":
        (src / name).symlink_to(f"../../elsewhere/{name}")
    elif how == "through a folder":
        (src / "x").symlink_to(elsewhere)
        (src / name).symlink_to(f"x/{name}")
    else:
        (tmp_path / "blobs").symlink_to(elsewhere)
        (src / name).symlink_to(f"../../blobs/{name}")
    where = str(elsewhere / name).replace(".", r"\.")
    with pytest.raises(CheckpointError, match=rf"{name} is a link to {where}, outside of its folder"):
        quantize_checkpoint(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_shard_that_leads_outside_is_refused(tmp_path):
    src = write_folder(tmp_path / "src", shards=2)
    shard = src / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / "x.safetensors")
    shard.symlink_to(tmp_path / "x.safetensors")
    for path in (src, src / "model.safetensors.index.json"):
        with pytest.raises(CheckpointError, match=r"00002\.safetensors is a link to .* outside of its folder"):
            inspect_checkpoint(path)


def test_a_further_modules_weights_that_lead_outside_are_refused(tmp_path):
    src = write_folder(tmp_path / "src")
    save_file(sample_tensors(), tmp_path / "x.safetensors")
    (src / "2_Dense").mkdir()
    (src / "2_Dense" / "model.safetensors").symlink_to(tmp_path / "x.safetensors")
    (src / "modules.json").write_text('[{"path": "2_Dense", "type": "Dense"}]')
    with pytest.raises(CheckpointError, match="2_Dense/model.safetensors is a link to .* outside of its folder"):
        quantize_checkpoint(src, tmp_path / "dst")


def test_links_within_the_folder_and_to_what_the_user_names(tmp_path):
    src = write_folder(tmp_path / "src")
    (src / "files").mkdir()
    for name in ("model.safetensors", "config.json"):
        (src / name).rename(src / "files" / name)
        (src / name).symlink_to(f"files/{name}")
    (tmp_path / "link").symlink_to(src)
    (tmp_path / "mine.safetensors").symlink_to(src / "files" / "model.safetensors")
    for path in (src, tmp_path / "link", tmp_path / "mine.safetensors"):
        assert quantize_checkpoint(path, tmp_path / f"{path.name}.dst").plan.quantized


def test_the_store_that_all_repositories_share(tmp_path, cache, snapshot):
    """Newer caches: a repository's blob is a link into blobs/ of the whole cache."""
    content = "ab" * 32
    blob = Path(os.path.realpath(snapshot / "model.safetensors"))
    store = cache / "blobs" / content[:2]
    store.mkdir(parents=True)
    blob.rename(store / content)
    blob.symlink_to(os.path.join("..", "..", "blobs", content[:2], content))
    assert quantize_checkpoint(snapshot, tmp_path / "dst").plan.quantized
    (store / content).rename(cache / "blobs" / "x.safetensors")
    blob.unlink()
    blob.symlink_to(os.path.join("..", "..", "blobs", "x.safetensors"))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        quantize_checkpoint(snapshot, tmp_path / "no")


def _pipe(path):
    os.mkfifo(path)


@pytest.mark.parametrize("name", ("config.json", "model.safetensors", "model.safetensors.index.json"))
@pytest.mark.parametrize("make", (_pipe, Path.mkdir, lambda path: path.symlink_to("nowhere")))
def test_what_should_be_a_file_and_is_none(tmp_path, name, make):
    """Not taken for absent: the copy would lack it."""
    src = write_folder(tmp_path / "src", shards=2 if "index" in name else 1)
    (src / name).unlink()
    make(src / name)
    with pytest.raises(CheckpointError, match=f"{name} is no file, or a link that leads nowhere"):
        quantize_checkpoint(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_folder_that_cannot_be_entered_is_said(tmp_path, monkeypatch):
    src = write_folder(tmp_path / "src")
    (src / "closed").mkdir()
    scan = os.scandir

    def denied(path):  # root, as whom tests may run, may enter every folder
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert quantize_checkpoint(src, tmp_path / "dst").skipped == {"closed": "cannot be listed: Permission denied"}


def test_folders_nested_too_deep(tmp_path):
    src = write_folder(tmp_path / "src")
    place = os.path.join(*["d"] * (others.MAX_DEPTH + 1))
    (src / place / "d" / "d").mkdir(parents=True)
    (src / place / "x.txt").write_text("")
    (src / place).with_name("y.txt").write_text("")
    report = quantize_checkpoint(src, tmp_path / "dst")
    assert report.skipped == {place: f"a folder in more than {others.MAX_DEPTH} others"}
    assert str(Path(place).with_name("y.txt")) in report.copied
