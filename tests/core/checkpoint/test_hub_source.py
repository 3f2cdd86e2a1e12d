"""A Hub's name as a source: the local cache, said; revisions, and what is only partly there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from fourbit.checkpoint import CheckpointError, source
from fourbit.checkpoint.compound import Compound
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.cli.app import app
from tests.core.checkpoint.test_source import NEW, OLD, into_cache
from tests.folders import contents, sample_tensors, write_folder, write_pipeline
from tests.support import installed, skip_or_fail

if not installed("huggingface_hub"):
    skip_or_fail("huggingface_hub is not installed: pip install 'fourbit[test]'")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, in which huggingface_hub looks; and no network."""
    from huggingface_hub import constants

    def no_network(*arguments, **options):
        raise AssertionError("network")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def snapshots(tmp_path, cache):
    """Two revisions of a model; refs/main is the one, a branch and a tag are the other."""
    into_cache(write_folder(tmp_path / "old", sample_tensors(1)), cache, "org/name", OLD, main=False)
    new = into_cache(write_folder(tmp_path / "new", shards=2), cache, "org/name", NEW)
    for name in ("v1.0", "refs/pr/3"):
        file = new.parent.parent / "refs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(OLD)
    return {revision: new.parent / revision for revision in (OLD, NEW)}


def run(*words, status=0):
    result = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "400"})
    assert result.exit_code == status, result.output
    return result


def weight_of(folder):
    name = "model.layers.0.self_attn.q_proj.weight"
    return next(t[name] for t in map(load_file, folder.glob("*.safetensors")) if name in t)


def test_every_command_takes_it_and_says_so(snapshots, tmp_path):
    said = f"org/name: from the local Hub cache, revision {NEW} ({snapshots[NEW]})"
    dst, back = tmp_path / "4", tmp_path / "16"
    for words in (
        ("quantize", "org/name", dst, "--dry-run"),
        ("quantize", "org/name", dst, "--json"),
        ("inspect", "org/name"),
        ("verify", "org/name"),
        ("estimate", "org/name"),
        ("compare", "org/name", dst),
    ):
        result = run(*words)
        assert said in result.stderr and said not in result.stdout, words
    quantize_checkpoint(tmp_path / "new", tmp_path / "same")
    written, same = contents(dst), contents(tmp_path / "same")
    for manifest in (written, same):
        manifest.pop("fourbit_manifest.json")
    assert written == same
    into_cache(dst, tmp_path / "hub", "org/packed", OLD)
    assert f"revision {OLD}" in run("dequantize", "org/packed", back).stderr
    assert quantize_checkpoint("org/name", tmp_path / "api").source == snapshots[NEW].resolve()


@pytest.mark.parametrize("revision", (OLD, "v1.0", "refs/pr/3"))
def test_a_revision(snapshots, tmp_path, revision):
    result = run("quantize", "org/name", tmp_path / "dst", "--revision", revision)
    assert f"revision {OLD}" in result.stderr
    quantize_checkpoint(snapshots[OLD], tmp_path / "want")
    assert (weight_of(tmp_path / "dst") == weight_of(tmp_path / "want")).all()
    for words in (("inspect", "org/name"), ("estimate", "org/name"), ("verify", "org/name")):
        assert f"revision {OLD}" in run(*words, "--revision", revision).stderr
    shown = run("compare", "org/name", "org/name", "--revision", revision).stderr
    assert shown.count(f"revision {OLD}") == shown.count(f"revision {NEW}") == 1
    if revision != "refs/pr/3":  # the root of the repository in the cache
        assert source.located(snapshots[OLD].parent.parent, revision) == snapshots[OLD]


def test_a_revision_that_is_not_there(snapshots, tmp_path):
    fetch = "`hf download org/name --revision v2` fetches it into the cache"
    result = run("inspect", "org/name", "--revision", "v2", status=1)
    assert "has no such model of the revision 'v2'" in result.stderr and fetch in result.stderr
    for path in (tmp_path / "new", "new"):
        result = run("inspect", path, "--revision", OLD, status=1)
        assert "is a path, not the Hub's name of one: it has no revision" in result.stderr
    with pytest.raises(CheckpointError, match="has no snapshot of 'v2'"):
        source.located(snapshots[NEW].parent.parent, "v2")
    for revision in ("..", "../../../x", "a b", ""):
        with pytest.raises(CheckpointError, match="is no revision|has no snapshot of"):
            source.located(snapshots[NEW].parent.parent, revision)


def test_what_is_not_in_the_cache(cache, tmp_path):
    result = run("quantize", "org/other", tmp_path / "dst", status=1)
    assert "org/other does not exist, and the Hub's cache has no such model" in result.stderr
    assert "`hf download org/other` fetches it into the cache" in result.stderr
    assert "gpt2 does not exist" in run("inspect", "gpt2", status=1).stderr
    assert not (tmp_path / "dst").exists()


def test_names_of_the_first_models(cache, tmp_path):
    into_cache(write_folder(tmp_path / "old"), cache, "gpt2", OLD)
    assert f"gpt2: from the local Hub cache, revision {OLD}" in run("inspect", "gpt2").stderr
    write_folder(tmp_path / "gpt2", sample_tensors(2))
    assert run("inspect", "gpt2").stderr == ""  # a folder of that name comes first
    write_folder(tmp_path / "org" / "name")
    into_cache(tmp_path / "old", cache, "org/name", OLD)
    assert run("inspect", "org/name").stderr == ""


@pytest.mark.parametrize("gone", ("shard", "blob", "all weights"))
def test_a_part_of_a_model(snapshots, tmp_path, gone):
    for file in snapshots[NEW].glob("model*"):
        if gone == "all weights" or (gone == "shard" and "00002-of" in file.name):
            file.unlink()
        elif gone == "blob" and "00002-of" in file.name:
            os.unlink(os.path.realpath(file))
    what = "has no .safetensors file" if gone == "all weights" else "names the shard model-00002-of-00002.safetensors"
    fetch = f"`hf download org/name --revision {NEW}` fetches the rest"
    for words in (
        ("quantize", "org/name", "dst"),
        ("inspect", "org/name"),
        ("quantize", "org/name", "dst", "--dry-run"),
    ):
        result = run(*words, status=1)
        assert what in result.stderr and fetch in result.stderr
    assert not (tmp_path / "dst").exists()


def test_a_part_of_a_folder_elsewhere_is_not_the_hubs(tmp_path):
    src = write_folder(tmp_path / "src", shards=2)
    (src / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        quantize_checkpoint(src, tmp_path / "dst")
    assert "is missing" in str(caught.value) and "hf download" not in str(caught.value)


def into_cache_whole(folder, cache, name, revision):
    """As `into_cache`, subfolders too."""
    snapshot = into_cache(write_folder(folder.parent / "empty", {}), cache, name, revision)
    for file in list(snapshot.iterdir()):
        file.unlink()
    for i, file in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        blob = snapshot.parent.parent / "blobs" / f"{i:040x}"
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_pipeline_in_the_cache(cache, tmp_path):
    src = write_pipeline(tmp_path / "src")
    snapshot = into_cache_whole(src, cache, "org/pipe", NEW)
    report = run("quantize", "org/pipe", tmp_path / "dst", "--json")
    assert len(json.loads(report.stdout)["models"]) == 3
    assert not Compound("org/pipe").quantized()
    for file in (snapshot / "transformer").glob("*.safetensors*"):
        file.unlink()
    result = run("quantize", "org/pipe", tmp_path / "no", status=1)
    assert "transformer has no .safetensors file" in result.stderr
    assert f"`hf download org/pipe --revision {NEW}` fetches the rest" in result.stderr
    (snapshot / "vae" / "config.json").unlink()
    (snapshot / "vae" / "config.json").symlink_to(tmp_path / "src" / "vae" / "config.json")
    with pytest.raises(CheckpointError, match="is a link to .* outside of its folder"):
        quantize_checkpoint("org/pipe", tmp_path / "no", components=["text_encoder"])


WHERE = "import sys; from fourbit.checkpoint import source; print(source.located(sys.argv[1]))"


@pytest.mark.parametrize(("variable", "below"), (("HF_HUB_CACHE", ""), ("HF_HOME", "hub")))
def test_where_the_cache_is(tmp_path, variable, below):
    """In a process of its own, since huggingface_hub reads its environment once."""
    into_cache(write_folder(tmp_path / "src"), tmp_path / "place" / below, "org/name", NEW)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    environment |= {variable: str(tmp_path / "place")}
    command = [sys.executable, "-c", WHERE, "org/name"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    found = str(tmp_path / "place" / below / "models--org--name" / "snapshots" / NEW)
    assert done.stdout.strip() == found, done.stderr
