"""A source, and a destination, at a URL: what is fetched, the bytes of a local folder, what is refused."""

from __future__ import annotations

import os
import shutil
import threading

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

import fourbit
from fourbit.checkpoint import CheckpointError, conversion, output, remote, staging
from fourbit.checkpoint.dequantize import dequantize_checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.urls import as_url
from fourbit.checkpoint.verify import verify_checkpoint
from fourbit.cli.app import app
from tests.core.checkpoint.test_together import succeeded, together
from tests.folders import contents, sample_tensors, write_folder, write_pipeline

URL = "memory://bucket/models/small"


@pytest.fixture(autouse=True)
def _memory(monkeypatch, tmp_path):
    """Nothing is there, and what is left in the system's temporary folder shows."""
    monkeypatch.setattr(output, "SYNC_SECONDS", 0)
    monkeypatch.setattr(conversion, "SMALL_BUDGET", 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(remote.tempfile, "tempdir", str(temporary))
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    assert os.listdir(temporary) == []


def put(folder, url=URL):
    fsspec.filesystem("memory").put(f"{folder}/", url, recursive=True)
    return url


@pytest.fixture
def src(tmp_path):
    return write_folder(tmp_path / "src", shards=2)


@pytest.fixture
def want(src, tmp_path):
    quantize_checkpoint(src, tmp_path / "want")
    return tmp_path / "want"


def weights(folder):
    """All files of a folder but the manifest, which says where it came from."""
    return {name: data for name, data in contents(folder).items() if name != "fourbit_manifest.json"}


@pytest.mark.parametrize("make", (lambda p: write_folder(p, shards=2), write_folder, write_pipeline))
@pytest.mark.parametrize("url", (URL, URL + "/"))
def test_the_bytes_are_those_of_a_local_folder(tmp_path, make, url):
    src = make(tmp_path / "model")
    quantize_checkpoint(src, tmp_path / "want")
    put(src)
    report = quantize_checkpoint(url, tmp_path / "dst")
    assert weights(tmp_path / "dst") == weights(tmp_path / "want") and verify_checkpoint(tmp_path / "dst").ok
    assert report.source == url and report.to_dict()["source"] == url


def test_dequantize(want, tmp_path):
    dequantize_checkpoint(want, tmp_path / "plain")
    dequantize_checkpoint(put(want), tmp_path / "dst")
    assert weights(tmp_path / "dst") == weights(tmp_path / "plain")


def test_weights_are_never_on_the_disk_and_read_once(src, want, tmp_path, monkeypatch):
    asked: dict[str, int] = {}
    real = MemoryFileSystem.cat_file

    def cat_file(self, path, start=None, end=None, **options):
        name = path.rpartition("/")[2]
        asked[name] = asked.get(name, 0) + end - start
        (shadow,) = (tmp_path / "temporary").iterdir()
        assert all(path.stat().st_blocks * 512 < 20_000 for path in shadow.glob("*.safetensors"))
        return real(self, path, start=start, end=end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    monkeypatch.setattr(remote, "RANGE_BYTES", 1000)
    monkeypatch.setattr(remote, "RANGES", 3)
    quantize_checkpoint(put(src), tmp_path / "dst")
    assert asked == {path.name: path.stat().st_size for path in src.glob("*.safetensors")}
    assert weights(tmp_path / "dst") == weights(want)


def test_weights_that_are_carried_over_are_fetched(tmp_path):
    src = write_pipeline(tmp_path / "model")
    (src / "scheduler" / "pytorch_model.bin").write_bytes(b"weights" * 99)
    (src / "unused.gguf").write_bytes(b"others" * 99)
    quantize_checkpoint(src, tmp_path / "want")
    report = quantize_checkpoint(put(src), tmp_path / "dst")
    assert weights(tmp_path / "dst") == weights(tmp_path / "want")
    assert report.left_out == ("unused.gguf",)
    assert (tmp_path / "dst" / "scheduler" / "pytorch_model.bin").read_bytes() == b"weights" * 99


def test_an_interrupted_run_is_resumed(src, want, tmp_path):
    put(src)

    def interrupt(name, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(URL, tmp_path / "dst", progress=interrupt)
    assert quantize_checkpoint(URL, tmp_path / "dst", resume=True).resumed_bytes > 0
    assert weights(tmp_path / "dst") == weights(want)
    again = quantize_checkpoint(URL, tmp_path / "dst", resume=True)
    assert again.resumed_bytes == again.bytes_before


def test_a_source_that_changes_between_runs(src, tmp_path):
    put(src)

    def interrupt(name, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(URL, tmp_path / "dst", progress=interrupt)
    name = "model-00001-of-00002.safetensors"
    fsspec.filesystem("memory").pipe(f"{URL}/{name}", (src / name).read_bytes())
    with pytest.raises(CheckpointError, match=f"cannot be resumed: the source's {name} has changed"):
        quantize_checkpoint(URL, tmp_path / "dst", resume=True)


@pytest.mark.parametrize("name", ("model-00001-of-00002.safetensors", "tokenizer.json"))
def test_a_source_that_changes_meanwhile(src, tmp_path, name):
    put(src)
    changed = []

    def change(tensor, done, total):
        if not changed:
            changed.append(fsspec.filesystem("memory").pipe(f"{URL}/{name}", (src / name).read_bytes()))

    with pytest.raises(CheckpointError, match=f"{name} has changed while it was read"):
        quantize_checkpoint(URL, tmp_path / "dst", progress=change)
    assert sorted(os.listdir(tmp_path)) == ["src", "temporary"]


def test_a_source_that_vanishes_meanwhile(src, tmp_path):
    put(src)
    with pytest.raises(
        CheckpointError, match=rf"{URL}(/model-0000.-of-00002.safetensors cannot be read: FileNotFound| does not exist)"
    ):
        quantize_checkpoint(
            *(URL, tmp_path / "dst"),
            progress=lambda *step: [MemoryFileSystem.store.pop(key) for key in list(MemoryFileSystem.store)],
        )
    assert not (tmp_path / "dst").exists()


def test_several_processes(src, want, tmp_path, monkeypatch):
    put(src)
    lock = threading.Lock()  # fsspec's files in memory have one position for all who read them
    for name in ("cat_file", "get_file"):
        real = getattr(MemoryFileSystem, name)

        def alone(self, *args, real=real, **options):
            with lock:
                return real(self, *args, **options)

        monkeypatch.setattr(MemoryFileSystem, name, alone)
    succeeded(together(URL, tmp_path / "dst", 3))
    assert weights(tmp_path / "dst") == weights(want)


def test_a_storage_that_fails(src, tmp_path, monkeypatch):
    put(src)
    real = MemoryFileSystem.cat_file
    calls = []

    def cat_file(self, path, *args, **options):
        calls.append(path)
        if len(calls) == 9:
            raise RuntimeError("503: slow\ndown")
        return real(self, path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cat_file", cat_file)
        with pytest.raises(CheckpointError, match=rf"{URL}/.* cannot be read: RuntimeError: 503: slow down"):
            quantize_checkpoint(URL, tmp_path / "dst")
    quantize_checkpoint(URL, tmp_path / "dst", resume=True)
    assert verify_checkpoint(tmp_path / "dst").ok


@pytest.mark.parametrize("returned", (b"", b"short", OSError("gone")))
def test_ranges_that_are_not_what_was_asked_for(src, tmp_path, monkeypatch, returned):
    put(src)
    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", lambda *args, **options: [returned])
    with pytest.raises(CheckpointError, match=r"safetensors cannot be read: (ValueError: it gave \d|OSError: gone)"):
        quantize_checkpoint(URL, tmp_path / "dst")


def test_errors_name_the_url(tmp_path):
    tensors = sample_tensors()
    tensors["lm_head.weight.absmax"] = tensors.pop("model.buffer")
    src = write_folder(tmp_path / "src", tensors)
    data = bytearray((src / "model.safetensors").read_bytes())
    data[9] = 0
    (src / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"^{URL}/model.safetensors cannot be read as safetensors"):
        quantize_checkpoint(put(src), tmp_path / "dst")


@pytest.mark.parametrize(
    ("url", "says"),
    (
        ("memory://nothing/here", "does not exist, or is empty"),
        ("memory://bucket/models/small/model-00001-of-00002.safetensors", "is a file; name the folder"),
        ("nosuchscheme://bucket/model", "cannot be read: ValueError: Protocol not known: nosuchscheme"),
        ("memory://bucket", "has no .safetensors file"),
    ),
)
def test_what_is_no_source(src, tmp_path, url, says):
    put(src)
    with pytest.raises(CheckpointError, match=says) as failed:
        quantize_checkpoint(url, tmp_path / "dst")
    assert str(failed.value).startswith(url) and "\n" not in str(failed.value)


def test_names_that_lead_elsewhere(src, tmp_path, monkeypatch):
    put(src)
    real = MemoryFileSystem.find
    monkeypatch.setattr(
        *(MemoryFileSystem, "find"),
        lambda self, path, **options: {**real(self, path, **options), f"{path}/a/../../evil.txt": {"size": 2}},
    )
    with pytest.raises(CheckpointError, match="which this machine cannot have"):
        quantize_checkpoint(URL, tmp_path / "dst")
    assert not (tmp_path / "evil.txt").exists()


@pytest.mark.parametrize("url", (URL, "s3://bucket/model", "s3:/bucket/model"))
@pytest.mark.parametrize("options", ({}, {"overwrite": True}, {"resume": True}))
def test_a_destination_is_refused(src, url, options, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="cannot rename a folder.*write to a folder and upload that"):
        quantize_checkpoint(src, url, **options)
    with pytest.raises(CheckpointError, match="cannot rename a folder"):
        dequantize_checkpoint(src, url, **options)
    assert not MemoryFileSystem.store and sorted(os.listdir()) == ["src", "temporary"]


def test_what_the_refusals_advise_works(src, want, tmp_path):
    """Upload, fetch, verify; as the messages say."""
    put(want, "memory://bucket/out")
    fsspec.filesystem("memory").get("memory://bucket/out", str(tmp_path / "back"), recursive=True)
    assert contents(tmp_path / "back") == contents(want) and verify_checkpoint(tmp_path / "back").ok


def test_the_commands(src, want, tmp_path):
    put(src)
    run = CliRunner().invoke
    done = run(app, ["quantize", URL, str(tmp_path / "dst")])
    assert done.exit_code == 0 and weights(tmp_path / "dst") == weights(want), done.output
    assert f"{URL} -> " in done.output
    assert run(app, ["quantize", URL, str(tmp_path / "none"), "--dry-run"]).exit_code == 0
    assert run(app, ["quantize", URL, str(tmp_path / "none"), "--revision", "main"]).exit_code == 2
    for command in (
        ["quantize", str(src), URL],
        ["quantize", str(src), URL, "--dry-run"],
        ["dequantize", str(want), URL],
    ):
        done = run(app, command)
        assert done.exit_code == 1 and "write to a folder and upload" in done.output
    for command in (["inspect", URL], ["verify", URL], ["compare", URL, str(src)], ["estimate", URL]):
        done = run(app, command)
        assert done.exit_code == 1 and f"{URL}: " in done.output and "fetch it first" in done.output
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("path", "url"),
    (
        ("s3://b/x", "s3://b/x"),
        ("s3:/b/x", "s3://b/x"),  # as pathlib makes it
        ("HF://org/name", "hf://org/name"),
        ("file:///data/model", "file:///data/model"),
        ("file:/data/model", "file:///data/model"),
        ("C:/models", None),
        ("C:\\models", None),
        ("org/name", None),
        ("a:b", None),
        ("/data/s3:/x", None),
        ("", None),
    ),
)
def test_what_is_a_url(path, url):
    assert as_url(path) == url


def test_a_folder_that_looks_like_a_url_is_one(src, want, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:").mkdir()
    shutil.copytree(src, tmp_path / "s3:" / "model")
    quantize_checkpoint("s3:/model", "s3:/out")
    assert weights(tmp_path / "s3:" / "out") == weights(want)


def test_files_of_this_machine_by_url(src, want, tmp_path):
    quantize_checkpoint(f"file://{src}", tmp_path / "dst", fourbit.QuantConfig())
    assert weights(tmp_path / "dst") == weights(want)
    assert not staging.unfinished_folder(tmp_path / "dst").exists()
