"""The keys of every command's --json, as its README.md lists them: a key that goes is a break for scripts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fourbit.cli import console
from tests.folders import write_folder

PLAN = {"source", "config", "blocksize", "parameters", "quantized_parameters", "bytes_before", "bytes_after"} | {
    *("bits_per_quantized_parameter", "bits_per_parameter", "large_left", "tensors", "described_by")
}
PLANNED = {"name", "shape", "dtype", "action", "rule", "bytes_before", "bytes_after", "large_left"}
INSPECTED = {"name", "shape", "type", "blocksize", "double_quant", "dtype", "parameters", "nbytes", "table_bytes"} | {
    *("file", "bits_per_parameter")
}
FIGURES = {"parameters", "rmse", "relative_rmse", "sqnr_db", "max_abs_error"}
COMPARED = FIGURES | {"name", "name_in_b", "shape", "type_a", "type_b", "identical", "error"}
SETTING = {"quant_type", "blocksize", "double_quant", "quantized_bytes", "other_bytes", "bytes", "resident_bytes"} | {
    *("bits_per_quantized_parameter", "bits_per_parameter")
}


def run(*arguments):
    """A process of its own, its output piped: what a script gets."""
    command = [sys.executable, "-m", "fourbit.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    value = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert next(iter(value)) == "schema" and value.pop("schema") == console.JSON_SCHEMA == 1
    return value


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("json")
    src = write_folder(place / "src")
    return src, place / "dst", run("quantize", src, place / "dst")


def test_quantize(folders):
    value = folders[2]
    keys = {"dry_run", "source", "destination", "files", "bytes_before", "bytes_after", "copied", "left_out"}
    assert set(value) == keys | {"skipped", "resumed_bytes", "seconds", "leftovers", "models", "plan"}
    assert set(value["plan"]) == PLAN and set(value["plan"]["tensors"][0]) == PLANNED


def test_quantize_dry_run(folders, tmp_path):
    value = run("quantize", folders[0], tmp_path / "new", "--dry-run")
    assert {"dry_run", "bytes_written", "models"} | PLAN <= set(value) and set(value["tensors"][0]) == PLANNED


def test_dequantize(folders, tmp_path):
    value = run("dequantize", folders[1], tmp_path / "new", "--dtype", "float32")
    keys = {"source", "destination", "dequantized", "carried", "files", "bytes_before", "bytes_after", "copied"}
    assert set(value) == keys | {"left_out", "skipped", "resumed_bytes", "seconds", "leftovers"}


def test_inspect(folders):
    value = run("inspect", folders[1])
    keys = {"path", "kind", "models", "files", "parameters", "quantized_parameters", "bytes", "tensors"}
    assert set(value) == keys | {"bits_per_quantized_parameter", "bits_per_parameter"}
    assert set(value["tensors"][0]) == INSPECTED


def test_verify(folders):
    value = run("verify", folders[1])
    assert set(value) == {"path", "ok", "manifest", "finished", "tensors", "quantized", "bytes", "faults", "notices"}


def test_compare(folders):
    value = run("compare", folders[0], folders[1])
    keys = {"a", "b", "compared", "identical", "errors", "total_of_differing", "only_in_a", "only_in_b", "tensors"}
    assert set(value) == keys
    assert set(value["total_of_differing"]) == FIGURES and set(value["tensors"][0]) == COMPARED


@pytest.mark.parametrize("of_folder", (False, True))
def test_estimate(folders, of_folder):
    value = run("estimate", *((folders[0],) if of_folder else ("--params", "7B")))
    keys = {"quantized_parameters", "other_parameters", "bytes_before", "largest_tensor_bytes"}
    assert set(value) == keys | {"peak_quantizing_bytes", "settings"} and set(value["settings"][0]) == SETTING
    if of_folder:
        assert value["largest_tensor_bytes"] == 300 * 64 * 4
        assert value["peak_quantizing_bytes"] == 3 * 300 * 64 * 4 + 500_000_000
        plain = next(s for s in value["settings"] if not s["double_quant"])
        assert plain["resident_bytes"] == plain["bytes"] + 4 * 64
    else:
        assert value["peak_quantizing_bytes"] is None


def test_backends():
    value = run("backends")
    assert set(value) == {"backends"}
    assert {"name", "state", "reason", "source", "device_types", "default_blocksize"} <= set(value["backends"][0])
