"""The benchmark of loading: its folder, its bounds, and a whole run on a folder that is soon loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.support import installed, skip_or_fail

if not installed("transformers"):
    skip_or_fail("transformers is not installed")


@pytest.fixture(scope="module")
def loading(load):
    return load("peers.loading")


def test_the_folder_is_a_model(loading, tmp_path):
    from transformers import LlamaForCausalLM

    largest = loading.make_source(tmp_path, 60_000_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == loading.FILES
    sizes = {}
    for file in files:
        with safe_open(tmp_path / file, "pt") as stream:
            sizes |= {name: stream.get_tensor(name).nbytes for name in stream.keys()}  # noqa: SIM118
    assert max(sizes.values()) == largest
    assert sum(sizes.values()) == pytest.approx(60_000_000, rel=0.2)
    _, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def cases(loading, **seconds_and_peaks):
    """Cases whose processes said the same each time."""
    names = {"empty": "EMPTY", "sixteen": "SIXTEEN", "fly": "FLY", "folder": "FOLDER", "bnb": "BNB_FOLDER"}
    made = {}
    for key, (seconds, peak) in seconds_and_peaks.items():
        name = getattr(loading, names[key])
        figures = {key: [peak] * 3 for key in ("peaks", "resident", "device_peaks")}
        made[name] = loading.Case(name, Path(), "", seconds=[seconds] * 3, **figures, nbytes=100_000_000)
    return made


def test_verdicts(loading):
    largest = 10_000_000
    bound = 100_000_000 + 3 * largest + 300_000_000
    base = {"empty": (0, 300_000_000), "sixteen": (1.0, 0), "bnb": (2.0, 0)}
    within = cases(loading, **base, fly=(1.3, 300_000_000 + bound), folder=(2.0, 0))
    assert all(verdict.met for verdict in loading.verdicts(within, largest, "cpu"))
    over = cases(loading, **base, fly=(1.31, 300_000_001 + bound), folder=(2.1, 0))
    judged = loading.verdicts(over, largest, "cpu")
    assert [(v.met, v.binding) for v in judged] == [(False, True), (True, True), (False, False), (False, False)]
    assert "BROKEN" in str(judged[0]) and "MISSED" in str(judged[2]) and str(judged[1]).endswith("met")
    del base["bnb"]
    alone = cases(loading, **base, fly=(1, bound), folder=(1, bound))
    assert len(loading.verdicts(alone, largest, "cpu")) == 3
    on_device = loading.verdicts(cases(loading, **base, fly=(1, bound + 1), folder=(1, bound)), largest, "cuda")
    assert [v.met for v in on_device if "on the device" in v.what] == [False, True]


def test_the_layers_have_to_be_whose_the_column_says(loading, benchmarks, tmp_path, monkeypatch):
    loading.make_source(tmp_path, 40_000_000)
    monkeypatch.chdir(benchmarks)
    with pytest.raises(SystemExit, match="the layers are of torch"):
        loading.Case(loading.SIXTEEN, tmp_path, "fourbit.").run("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.long
def test_a_whole_run(benchmarks, tmp_path):
    command = [sys.executable, "-m", "peers.loading", "--size-gb", "0.06", "--rounds", "1"]
    command += ["--folder", str(tmp_path), "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=benchmarks, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["cases"]
    plain, folder = found["16 bit"], found["fourbit, 4-bit folder"]
    assert folder["nbytes"] < 0.6 * plain["nbytes"] and found["fourbit, on the fly"]["nbytes"] == folder["nbytes"]
    assert all(case["peaks"][0] > 50_000_000 for case in found.values())
