"""Code that comes with a folder is never run, and nobody is asked whether it may be."""

from __future__ import annotations

import builtins
import json

import pytest

from tests.folders import write_folder
from tests.support import installed, skip_or_fail

if not installed("transformers"):
    skip_or_fail("transformers is not installed")

from fourbit_demo import evaluate
from fourbit_transformers import load


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model whose configuration, model and tokenizer are code of its own, which leaves a trace."""
    src = write_folder(tmp_path / "src")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    config = {"model_type": "evil", "architectures": ["Model"], "auto_map": names}
    (src / "config.json").write_text(json.dumps(config))
    (src / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": names}))
    trace = tmp_path / "it ran"
    (src / "evil.py").write_text(f"open({str(trace)!r}, 'w')\n")
    monkeypatch.setattr(builtins, "input", lambda *a: pytest.fail("it asks"))
    yield src
    assert not trace.exists()


def test_load(folder):
    with pytest.raises(ValueError, match=r"needs code of its own \(auto_map in its config.json\).*trust_remote_code"):
        load(folder)


@pytest.mark.parametrize("kind", (None, 3, [], {}))
def test_load_with_an_odd_type(folder, kind):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    with pytest.raises(ValueError, match="needs code of its own"):
        load(folder)


@pytest.mark.parametrize("names", (["Trainer"], ["pipeline"], ["logging"], [3], [["LlamaModel"]]))
def test_load_takes_nothing_but_a_model_for_one(folder, names):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": names}))
    # what is no list of words some versions of transformers refuse before us, with an error of their own
    with pytest.raises(
        Exception, match=r"names no architecture that transformers has|Validation error for .*architectures"
    ):
        load(folder)


def test_the_demos_own_loading(folder):
    with pytest.raises(ValueError, match="trust_remote_code"):
        evaluate._load(folder, is_4bit=False)
    with pytest.raises(ValueError, match="trust_remote_code"):
        evaluate._tokenizer(folder)
