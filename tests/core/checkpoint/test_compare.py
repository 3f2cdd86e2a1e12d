"""Comparing folders: the figures against a plain computation, names, shapes and odd values."""

from __future__ import annotations

import csv
import json
import math
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import fourbit
from fourbit.checkpoint import CheckpointError, compare
from fourbit.checkpoint.compare import compare_checkpoints
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.cli.app import app
from tests.folders import QUANTIZED, sample_tensors, write_folder
from tests.support import installed, skip_or_fail


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="fourbit")


@pytest.fixture
def folders(tmp_path):
    src = write_folder(tmp_path / "src")
    quantize_checkpoint(src, tmp_path / "dst", fourbit.QuantConfig(double_quant=True))
    return src, tmp_path / "dst"


@pytest.mark.parametrize("piece", (7, 1 << 20))
def test_figures(folders, monkeypatch, piece):
    monkeypatch.setattr(compare, "_PIECE", piece)
    found = compare_checkpoints(*folders)
    by_name = {t.name: t for t in found.tensors}
    assert set(by_name) == set(sample_tensors()) and not found.errors
    for name, w in sample_tensors().items():
        t = by_name[name]
        assert t.identical == (name not in QUANTIZED) and t.shape == tuple(w.shape)
        if t.identical:
            assert (t.rmse, t.max_abs_error, t.sqnr_db) == (0, 0, None)
            continue
        packed, state = fourbit.quantize_4bit(w, double_quant=True)
        a, b = w.double(), fourbit.dequantize_4bit(packed, state).double()
        d = b - a
        assert t.rmse == pytest.approx(float(d.square().mean().sqrt()), rel=1e-12)
        assert t.relative_rmse == pytest.approx(float(d.norm() / a.norm()), rel=1e-12)
        assert t.sqnr_db == pytest.approx(20 * math.log10(a.norm() / d.norm()), rel=1e-12)
        assert t.max_abs_error == float(d.abs().max())
        assert (t.type_a, t.type_b) == (str(w.dtype)[6:], "nf4")
    ratios = [t.sqnr_db for t in found.tensors if t.sqnr_db is not None]
    assert ratios == sorted(ratios) and len(ratios) == len(QUANTIZED)
    assert found.tensors[-1].identical and not found.tensors[0].identical
    assert found.total is not None and found.total.parameters == 28613
    assert min(ratios) < found.total.sqnr_db < max(ratios)


def test_either_side_may_be_4bit(folders):
    src, dst = folders
    assert all(t.identical for t in compare_checkpoints(dst, dst).tensors)
    back = compare_checkpoints(dst, src)
    assert {t.name for t in back.tensors if not t.identical} == set(QUANTIZED)


def test_names_and_shapes(tmp_path):
    a = {"x": torch.ones(3), "y": torch.ones(2, 3), "z": torch.ones(2)}
    save_file(a, tmp_path / "a.safetensors")
    save_file({"x": torch.ones(3), "y": torch.ones(3, 2), "new": torch.ones(1)}, tmp_path / "b.safetensors")
    found = compare_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (found.only_in_a, found.only_in_b) == (("z",), ("new",))
    assert [t.error for t in found.tensors] == ["shape [2, 3] in A and [3, 2] in B", None]
    assert found.total is None
    result = run("compare", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (
        result.exit_code == 1 and "error: y: shape [2, 3] in A" in result.stderr and "only in B: new" in result.stdout
    )
    save_file({"other": torch.ones(1)}, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="no tensor name in common"):
        compare_checkpoints(tmp_path / "a.safetensors", tmp_path / "c.safetensors")


def test_tied_tensors(tmp_path):
    """A head that one side keeps and the other has only as its embedding, or as safetensors' save_model notes it."""
    tensors = sample_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    whole = write_folder(tmp_path / "whole", tensors)
    del tensors["lm_head.weight"]
    tied = write_folder(tmp_path / "tied", tensors)
    assert compare_checkpoints(whole, tied).only_in_a == ("lm_head.weight",)
    for folder in (whole, tied):
        (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    found = compare_checkpoints(whole, tied)
    assert not found.only_in_a and all(t.identical for t in found.tensors)
    assert {t.name_in_b for t in found.tensors if t.name == "lm_head.weight"} == {"model.embed_tokens.weight"}
    assert compare_checkpoints(tied, whole).only_in_b == ()
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "b.safetensors", metadata={"b": "a"})
    assert not compare_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors").only_in_a


def test_odd_values(tmp_path):
    inf = float("inf")
    a = {
        "nan": torch.tensor([1.0, float("nan")]),
        "mask": torch.tensor([0.0, -inf]),
        "other_mask": torch.tensor([1.0, -inf]),
        "zero": torch.zeros(2),
        "empty": torch.zeros(0, 3),
        "complex": torch.tensor([1 + 1j, 2]),
        "int": torch.tensor([1, 2]),
        "bool": torch.tensor([True, False]),
    }
    b = dict(a)
    b |= {"other_mask": torch.tensor([1.0, 1.0]), "zero": torch.ones(2), "complex": torch.tensor([1 + 0j, 2])}
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    result = run("compare", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json")
    assert result.exit_code == 1
    found = {t["name"]: t for t in json.loads(result.stdout)["tensors"]}
    assert {name for name, t in found.items() if t["error"]} == {"nan", "other_mask"}
    assert {name for name, t in found.items() if t["identical"]} == {"mask", "empty", "int", "bool"}
    assert found["zero"]["rmse"] == 1 and found["zero"]["sqnr_db"] is None and found["zero"]["relative_rmse"] is None
    assert found["complex"]["rmse"] == pytest.approx(math.sqrt(0.5)) and found["complex"]["max_abs_error"] == 1


def test_csv_and_text(folders, tmp_path):
    result = run("compare", *folders, "--csv", tmp_path / "t.csv")
    assert result.exit_code == 0 and result.stderr == "" and "\x1b" not in result.stdout
    assert "11 tensors compared, 7 of them identical" in result.stdout and "SQNR dB" in result.stdout
    with open(tmp_path / "t.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == [t.name for t in compare_checkpoints(*folders).tensors]
    assert float(rows[0]["sqnr_db"]) < 25 and rows[-1]["sqnr_db"] == "" and rows[-1]["identical"] == "True"


def test_plot(folders, tmp_path):
    if not installed("matplotlib"):
        skip_or_fail("matplotlib is not installed: the plot is not drawn")
    result = run("compare", *folders, "--plot", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "p.png").stat().st_size > 5000
    assert "matplotlib.pyplot" not in sys.modules
    same = run("compare", folders[0], folders[0], "--plot", tmp_path / "q.png")
    assert same.exit_code == 1 and "nothing to plot" in same.stderr and not (tmp_path / "q.png").exists()


def test_plot_without_matplotlib(folders, tmp_path, monkeypatch):
    from fourbit.cli import compare_plot

    monkeypatch.setattr(compare_plot, "find_spec", lambda name: None)
    result = run("compare", *folders, "--plot", tmp_path / "p.png")
    assert result.exit_code == 1 and "pip install 'fourbit[plot]'" in result.stderr and result.stdout == ""
