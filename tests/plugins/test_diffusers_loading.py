"""How 4-bit models of diffusers are read: many files, several devices, old names, a single file."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourbit.checkpoint.quantize import quantize_checkpoint
from tests.plugins import diffusers_models as tiny
from tests.plugins.diffusers_models import assert_same, folder_of, packed
from tests.support import installed, skip_or_fail

if not installed("diffusers"):
    skip_or_fail("diffusers is not installed: pip install 'fourbit[test]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def quiet():
    import diffusers

    diffusers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("size", ("20KB", "3KB"))
def test_shards(tmp_path, size):
    """No weight is apart from its state, whatever the size of a file; in other writers' folders it may be."""
    from fourbit_diffusers import FourbitConfig

    cls, src = folder_of("unet", tmp_path)
    cls.from_pretrained(src).save_pretrained(src, max_shard_size=size)
    (src / "diffusion_pytorch_model.safetensors").unlink()
    model = cls.from_pretrained(src, quantization_config=FourbitConfig(double_quant=True))
    model.save_pretrained(tmp_path / "4", max_shard_size=size)
    files = sorted((tmp_path / "4").glob("*.safetensors"))
    assert len(files) > 5
    for file in files:
        names = load_file(file).keys()
        for name in packed(model):
            weight = name.partition(".weight")[0] + ".weight"
            assert (name in names) == (weight in names)
    assert_same(model, cls.from_pretrained(tmp_path / "4"))
    index = tmp_path / "4" / "diffusion_pytorch_model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    where = {}
    for number, (name, tensor) in enumerate((n, t) for file in files for n, t in load_file(file).items()):
        where.setdefault(files[number % len(files)].name, {})[name] = tensor
    for file, tensors in where.items():
        save_file(tensors, tmp_path / "4" / file)
        weight_map |= dict.fromkeys(tensors, file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(model, cls.from_pretrained(tmp_path / "4"))


@pytest.mark.parametrize("where", ("cpu", "auto", "disk", "disk in part"))
def test_device_maps(tmp_path, where):
    from fourbit_diffusers import FourbitConfig

    cls, src = folder_of("unet", tmp_path)
    want = cls.from_pretrained(src, quantization_config=FourbitConfig(double_quant=True))
    want.save_pretrained(tmp_path / "4")
    options = {"device_map": where}
    if where.startswith("disk"):
        parts = [name for name, _ in want.named_children()]
        device_map = dict.fromkeys(parts, "disk")
        if where == "disk in part":
            device_map |= dict.fromkeys(parts[::2], "cpu")
        options = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    for folder, config in ((src, FourbitConfig(double_quant=True)), (tmp_path / "4", None)):
        model = cls.from_pretrained(folder, quantization_config=config, **options)
        assert torch.equal(tiny.run(model), tiny.run(want))
        if where == "disk":
            with pytest.raises(ValueError, match="offloaded"):
                model.save_pretrained(tmp_path / "no")
        elif where != "disk in part":
            assert_same(model, want)


def test_old_names(tmp_path):
    """Old autoencoders call their attention's tensors otherwise; diffusers renames them while it reads."""
    from fourbit_diffusers import FourbitConfig

    cls, src = folder_of("autoencoder", tmp_path)
    file = src / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for name in list(tensors):
        for new, before in old.items():
            if f".{new}." in name:
                tensors[name.replace(f".{new}.", f".{before}.")] = tensors.pop(name)
    save_file(tensors, file)
    want = cls.from_pretrained(src, quantization_config=FourbitConfig())
    report = quantize_checkpoint(src, tmp_path / "4")
    assert {t.name.split(".")[-2] for t in report.plan.quantized} == {"query", "key", "value", "proj_attn"}
    assert_same(cls.from_pretrained(tmp_path / "4"), want)


def test_single_file(tmp_path):
    """from_single_file quantizes on the fly, too."""
    from fourbit_diffusers import FourbitConfig

    cls, src = folder_of("flux", tmp_path)
    want = cls.from_pretrained(src, quantization_config=FourbitConfig())
    file = src / "diffusion_pytorch_model.safetensors"
    got = cls.from_single_file(str(file), config=str(src), quantization_config=FourbitConfig())
    assert_same(got, want)
    got.save_pretrained(tmp_path / "4")
    assert_same(cls.from_pretrained(tmp_path / "4"), want)


def test_planning_imports_no_library():
    """fourbit asks its plugins about every model, and diffusers is imported only for one of its own."""
    code = """if True:
        import sys, torch, fourbit
        fourbit.quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 64)))
        assert "fourbit_models.diffusers" in sys.modules and "diffusers" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)
