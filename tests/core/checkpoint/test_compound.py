"""Folders of several models, pipelines and sentence encoders: one conversion, one manifest, one list of tensors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fourbit
from fourbit.checkpoint import CheckpointError, layouts, output
from fourbit.checkpoint.compare import compare_checkpoints
from fourbit.checkpoint.compound import Compound
from fourbit.checkpoint.dequantize import dequantize_checkpoint
from fourbit.checkpoint.inspect import inspect_checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.verify import verify_checkpoint
from fourbit.cli.app import app
from tests.folders import COMPONENTS, contents, write_folder, write_pipeline

STEM = "diffusion_pytorch_model"
LAYERS = [f"blocks.{i}.to_q.weight" for i in range(4)]


@pytest.fixture
def src(tmp_path):
    return write_pipeline(tmp_path / "src")


@pytest.fixture
def packed(src, tmp_path):
    quantize_checkpoint(src, tmp_path / "packed", fourbit.QuantConfig(double_quant=True))
    return tmp_path / "packed"


def run(*words):
    result = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def tensors_of(folder):
    """Every tensor of one model's folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_pipeline_there_and_back(src, tmp_path):
    config = fourbit.QuantConfig("fp4", blocksize=32)
    report = quantize_checkpoint(src, tmp_path / "4", config)
    back = dequantize_checkpoint(tmp_path / "4", tmp_path / "16")
    files = (f"transformer/{STEM}.safetensors", "text_encoder/model.safetensors", f"vae/{STEM}.safetensors")
    assert report.files == back.files == files
    assert report.left_out == back.left_out == () and not report.skipped
    assert set(report.copied) == {"model_index.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"}
    quantized = {f"{name}/{layer}" for name in ("transformer", "text_encoder") for layer in LAYERS}
    assert {t.name for t in report.plan.quantized} == set(back.dequantized) == quantized
    assert {name: len(plan.quantized) for name, plan in report.plans.items()} == {
        "transformer": 4,
        "text_encoder": 4,
        "vae": 0,
    }
    for name in COMPONENTS:
        before, four, after = (tensors_of(tmp_path / place / name) for place in ("src", "4", "16"))
        said = config_of(tmp_path / "4" / name).get("quantization_config", {})
        assert set(before) == set(after)
        if name == "vae":
            assert not said and set(four) == set(before) and report.plans[name].quantized == ()
            assert config_of(src / name) == config_of(tmp_path / "4" / name)
        else:
            assert said["bnb_4bit_quant_type"] == "fp4" and said["quant_method"] == "bitsandbytes"
            assert not any("/" in key for key in four)
        for key, tensor in before.items():
            want = tensor
            if f"{name}/{key}" in quantized:
                codes, state = fourbit.quantize_4bit(tensor, quant_type="fp4", blocksize=32)
                assert torch.equal(four[key], codes)
                want = fourbit.dequantize_4bit(codes, state)
            assert torch.equal(after[key], want), (name, key)
        assert config_of(tmp_path / "16" / name) == config_of(src / name)
    assert verify_checkpoint(tmp_path / "4").ok and verify_checkpoint(tmp_path / "16").ok
    assert verify_checkpoint(src).ok and not verify_checkpoint(src).manifest


def test_a_component_alone_is_the_same(src, packed, tmp_path):
    quantize_checkpoint(src / "transformer", tmp_path / "alone", fourbit.QuantConfig(double_quant=True))
    alone, inside = contents(tmp_path / "alone"), contents(packed / "transformer")
    alone.pop("fourbit_manifest.json")
    assert alone == inside


def test_inspect_and_compare_name_the_component(src, packed):
    found = inspect_checkpoint(packed)
    assert found.models == {
        "transformer": "4-bit, in the bitsandbytes layout",
        "text_encoder": "4-bit, in the bitsandbytes layout",
        "vae": "plain, not quantized",
    }
    assert found.kind.startswith("a pipeline of diffusers; transformer: 4-bit")
    by_name = {t.name: t for t in found.tensors}
    assert len(by_name) == 18 and by_name["transformer/blocks.0.to_q.weight"].double_quant
    assert by_name["vae/norm.weight"].file == f"vae/{STEM}.safetensors"
    assert found.nbytes == sum(
        t.nbytes for files in map(tensors_of, map(packed.joinpath, COMPONENTS)) for t in files.values()
    )
    compared = compare_checkpoints(src, packed)
    assert not compared.errors and not compared.only_in_a and not compared.only_in_b
    assert {t.name for t in compared.tensors if not t.identical} == {
        f"{name}/{layer}" for name in ("transformer", "text_encoder") for layer in LAYERS
    }
    assert "vae/norm.weight" in run("inspect", packed).stdout


def test_plans_and_estimates(src, tmp_path):
    report = quantize_checkpoint(src, tmp_path / "dst")
    assert fourbit.plan(src) == report.plan
    dry = json.loads(run("quantize", src, tmp_path / "new", "--dry-run", "--json").stdout)
    done = json.loads(run("quantize", src, tmp_path / "new", "--json").stdout)
    assert dry["tensors"] == done["plan"]["tensors"] and dry["models"] == done["models"]
    assert dry["bytes_written"] == done["bytes_after"] == Compound(tmp_path / "dst").nbytes
    assert [each["folder"] for each in done["models"]] == list(COMPONENTS)
    estimated = json.loads(run("estimate", src, "--json").stdout)
    assert estimated["quantized_parameters"] == report.plan.quantized_parameters
    shown = run("quantize", src, tmp_path / "again").stdout
    assert "transformer: 4 of 6 tensors quantized" in shown
    assert "vae: as it is (of vae, which stays as it is by default)" in shown


def test_components_are_chosen(src, tmp_path):
    report = quantize_checkpoint(src, tmp_path / "dst", components=["vae"])
    assert {t.name.partition("/")[0] for t in report.plan.quantized} == {"vae"}
    assert "quantization_config" not in config_of(tmp_path / "dst" / "transformer")
    value = json.loads(run("quantize", src, tmp_path / "x", "--components", "vae, transformer", "--json").stdout)
    assert {each["folder"] for each in value["models"] if each["quantized"]} == {"vae", "transformer"}
    for components, message in (
        (["x"], "no component 'x'; those with weights in safetensors are transformer, text_e"),
        ([], "components, and none is chosen"),
    ):
        with pytest.raises(CheckpointError, match=message):
            quantize_checkpoint(src, tmp_path / "no", components=components)
    with pytest.raises(CheckpointError, match="is no pipeline of diffusers: it has no components to choose from"):
        quantize_checkpoint(src / "vae", tmp_path / "no", components=["vae"])
    save_file({"norm.weight": torch.ones(64)}, src / "vae" / f"{STEM}.safetensors")
    with pytest.raises(CheckpointError, match="vae: no tensor is quantized"):
        quantize_checkpoint(src, tmp_path / "no", components=["transformer", "vae"])
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("name", "library", "kind", "quantized"),
    (
        ("unet", "diffusers", "UNet2DConditionModel", True),
        ("transformer_2", "diffusers", "WanTransformer3DModel", True),
        ("prior", "diffusers", "PriorTransformer", True),
        ("decoder", "stable_cascade", "StableCascadeUNet", False),
        ("decoder", "diffusers", "StableCascadeUNet", True),
        ("controlnet", "diffusers", "ControlNetModel", True),
        ("text_encoder_3", "transformers", "T5EncoderModel", True),
        ("prior_text_encoder", "transformers", "CLIPTextModelWithProjection", True),
        ("vae", "diffusers", "AutoencoderKL", False),
        ("vqvae", "diffusers", "VQModel", False),
        ("safety_checker", "stable_diffusion", "StableDiffusionSafetyChecker", False),
        ("image_encoder", "transformers", "CLIPVisionModelWithProjection", False),
    ),
)
def test_which_are_quantized_by_default(tmp_path, name, library, kind, quantized):
    (tmp_path / name).mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / name / "model.safetensors")
    (tmp_path / "model_index.json").write_text(json.dumps({name: [library, kind]}))
    (part,) = layouts.find(tmp_path).parts
    assert (part.folder, not part.left) == (name, quantized)


def test_weights_in_another_form(src, tmp_path):
    """Of a component that stays they are carried over; one that is to be quantized must have them in safetensors."""
    (src / "vae" / f"{STEM}.safetensors").rename(src / "vae" / f"{STEM}.bin")
    (src / "vae" / f"{STEM}.fp16.bin").write_bytes(b"a variant")
    (src / "transformer" / f"{STEM}.bin").write_bytes(b"the same again")
    (src / "flux1-dev.safetensors").write_bytes(b"of another program")
    report = quantize_checkpoint(src, tmp_path / "dst")
    assert f"vae/{STEM}.bin" in report.copied and list(report.plans) == ["transformer", "text_encoder"]
    assert set(report.left_out) == {f"vae/{STEM}.fp16.bin", f"transformer/{STEM}.bin", "flux1-dev.safetensors"}
    assert verify_checkpoint(tmp_path / "dst").ok
    (src / "text_encoder" / "model.safetensors").rename(src / "text_encoder" / "pytorch_model.bin")
    for components in (None, ["text_encoder"]):
        with pytest.raises(
            CheckpointError, match="text_encoder has no .safetensors file; it has pytorch_model.bin, and"
        ):
            quantize_checkpoint(src, tmp_path / "no", components=components)
    report = quantize_checkpoint(src, tmp_path / "some", components=["transformer"])
    assert "text_encoder/pytorch_model.bin" in report.copied


def test_a_quantized_component(src, tmp_path):
    """It is refused where it is to be quantized again, and else carried over; dequantizing finds it."""
    quantize_checkpoint(src / "transformer", tmp_path / "t")
    for file in (src / "transformer").iterdir():
        file.unlink()
    for name in (f"{STEM}.safetensors", "config.json"):
        (tmp_path / "t" / name).rename(src / "transformer" / name)
    with pytest.raises(CheckpointError, match="transformer is quantized already"):
        quantize_checkpoint(src, tmp_path / "no")
    report = quantize_checkpoint(src, tmp_path / "dst", components=["text_encoder"], max_shard_size=1)
    assert config_of(tmp_path / "dst" / "transformer") == config_of(src / "transformer")
    assert len([file for file in report.files if "transformer/" in file]) == 6  # no weight apart from its state
    before, after = (tensors_of(folder / "transformer") for folder in (src, tmp_path / "dst"))
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    back = dequantize_checkpoint(tmp_path / "dst", tmp_path / "back")
    assert len(back.dequantized) == 8 and "quantization_config" not in config_of(tmp_path / "back" / "transformer")


@pytest.mark.parametrize("moment", range(1, 18, 4))
def test_an_interrupted_run_is_resumed_to_the_same_bytes(src, tmp_path, monkeypatch, moment):
    monkeypatch.setattr(output, "SYNC_SECONDS", 0)
    options = {"max_shard_size": 4000}
    quantize_checkpoint(src, tmp_path / "want", **options)
    seen = []

    def interrupt(name, done, total):
        seen.append(done)
        if len(seen) == moment:
            raise KeyboardInterrupt

    dst = tmp_path / "dst"
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(src, dst, progress=interrupt, **options)
    assert not dst.exists()
    with pytest.raises(CheckpointError, match=r"cannot be resumed: quantization_config is .*was|the plan"):
        quantize_checkpoint(src, dst, resume=True, components=["transformer"], **options)
    report = quantize_checkpoint(src, dst, resume=True, **options)
    assert report.resumed_bytes >= seen[-1] and contents(dst) == contents(tmp_path / "want")
    assert sum("-of-" in file for file in report.files) > 4
    again = quantize_checkpoint(src, dst, resume=True, **options)
    assert again.resumed_bytes == again.bytes_before


@pytest.mark.parametrize(
    ("name", "fault"),
    (
        (f"vae/{STEM}.safetensors", "'vae/norm.weight' are not those that were written"),
        ("transformer/config.json", "transformer/config.json is not as it was written"),
        ("tokenizer/vocab.json", "tokenizer/vocab.json is not as it was written"),
        ("model_index.json", "model_index.json"),
    ),
)
def test_verify_finds_what_is_broken(packed, name, fault):
    data = bytearray((packed / name).read_bytes())
    data[-1] ^= 1 if name.endswith("safetensors") else ord("}") ^ ord(" ")
    (packed / name).write_bytes(data)
    assert any(fault in each for each in verify_checkpoint(packed).faults), verify_checkpoint(packed)


def test_verify_finds_what_is_missing_or_new(packed):
    (packed / "transformer" / "more.safetensors").write_bytes((packed / "vae" / f"{STEM}.safetensors").read_bytes())
    (packed / "scheduler" / "scheduler_config.json").unlink()
    faults = verify_checkpoint(packed).faults
    assert len(faults) == 2
    assert faults[0].endswith("scheduler_config.json is missing") and "more.safetensors is there, and" in faults[1]
    (packed / "vae" / f"{STEM}.safetensors").unlink()
    assert any("the tensor 'vae/norm.weight' is missing" in each for each in verify_checkpoint(packed).faults)


def test_overwriting_a_pipeline(src, packed, tmp_path):
    (packed / "transformer" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds something else than a model.* transformer/notes.txt"):
        quantize_checkpoint(src, packed, overwrite=True)
    (packed / "transformer" / "notes.txt").unlink()
    report = quantize_checkpoint(src, packed, fourbit.QuantConfig("fp4"), overwrite=True)
    assert verify_checkpoint(packed).ok and not report.leftovers
    with pytest.raises(CheckpointError, match="holds something else than a model"):  # nobody's manifest says what it is
        quantize_checkpoint(packed.parent / "src", write_pipeline(tmp_path / "other"), overwrite=True)


@pytest.mark.parametrize(
    "name", ("../elsewhere", "..", ".", "/etc", "a/b", "a\\b", "c:", "", "x\0y", "transformer/../../elsewhere")
)
def test_components_elsewhere(src, tmp_path, name):
    listed = json.loads((src / "model_index.json").read_text())
    (src / "model_index.json").write_text(json.dumps({**listed, name: ["diffusers", "UNet2DModel"]}))
    (tmp_path / "elsewhere").mkdir()
    save_file({"a.weight": torch.ones(64, 64)}, tmp_path / "elsewhere" / "model.safetensors")
    for call in (Compound, inspect_checkpoint, lambda path: quantize_checkpoint(path, tmp_path / "dst")):
        with pytest.raises(CheckpointError, match="names the component .* which is no folder within"):
            call(src)
    assert not verify_checkpoint(src).ok and not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    "what", ("transformer", "transformer/config.json", f"vae/{STEM}.safetensors", "model_index.json")
)
def test_links_out_of_a_pipeline(src, tmp_path, what):
    (src / what).rename(tmp_path / "outside")
    (src / what).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="is a link to .* outside of its folder, and is not followed"):
        quantize_checkpoint(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("[]", "holds a JSON list, want an object"),
        ("{", "is not valid JSON"),
        ('{"vae": ["a", "b"], "vae": ["a", "b"]}', "'vae' twice"),
        (json.dumps({f"c{i}": ["a", "b"] for i in range(layouts.MOST_PARTS + 1)}), "names more than 1000 components"),
        (
            '{"vae": 3, "unet": [], "transformer": ["a"], "text_encoder": [1, 2]}',
            "no component has a .safetensors file",
        ),
    ),
)
def test_absurd_lists_of_components(src, tmp_path, text, message):
    (src / "model_index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(src, tmp_path / "dst")


def sentence_encoder(folder: Path, transformer: str) -> Path:
    """A transformer, pooling and a Dense module, as sentence-transformers lays them out."""
    write_folder(folder / transformer if transformer else folder)
    (folder / "2_Dense").mkdir()
    save_file({"linear.weight": torch.randn(64, 128)}, folder / "2_Dense" / "model.safetensors")
    (folder / "2_Dense" / "config.json").write_text('{"in_features":128}')
    listed = [
        (transformer, "Transformer"),
        ("1_Pooling", "Pooling"),
        ("2_Dense", "Dense"),
        ("3_Normalize", "Normalize"),
    ]
    (folder / "modules.json").write_text(
        json.dumps([{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in listed])
    )
    return folder


@pytest.mark.parametrize("transformer", ("", "0_Transformer"))
def test_a_sentence_encoder(tmp_path, transformer):
    """The transformer is quantized; Dense stays in one file, as it is: sentence-transformers reads no other."""
    src = sentence_encoder(tmp_path / "src", transformer)
    report = quantize_checkpoint(src, tmp_path / "4", max_shard_size=9000)
    prefix = f"{transformer}/" if transformer else ""
    assert len(report.files) > 2 and report.files[-1] == "2_Dense/model.safetensors"
    assert all(file.startswith(f"{prefix}model-") for file in report.files[:-1])
    assert (tmp_path / "4" / f"{prefix}model.safetensors.index.json").is_file()
    assert report.plan.quantized and all(t.name.startswith(prefix + "model.layers") for t in report.plan.quantized)
    rule = next(t.rule for t in report.plan.tensors if t.name == "2_Dense/linear.weight")
    assert rule == "of the module Dense, which sentence-transformers loads itself"
    dense = [load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"] for folder in (src, tmp_path / "4")]
    assert torch.equal(*dense)
    assert (tmp_path / "4/2_Dense/config.json").read_text() == '{"in_features":128}'
    back = dequantize_checkpoint(tmp_path / "4", tmp_path / "16")
    assert len(back.dequantized) == len(report.plan.quantized)
    for folder in (tmp_path / "4", tmp_path / "16"):
        assert verify_checkpoint(folder).ok and not compare_checkpoints(src, folder).errors
    with pytest.raises(CheckpointError, match="is no pipeline of diffusers"):
        quantize_checkpoint(src, tmp_path / "no", components=["2_Dense"])


def test_two_models_with_one_name(tmp_path):
    src = sentence_encoder(tmp_path / "src", "")
    save_file({"2_Dense/linear.weight": torch.randn(64, 64)}, src / "model.safetensors")
    with pytest.raises(CheckpointError, match="two of its models have the tensor '2_Dense/linear.weight'"):
        quantize_checkpoint(src, tmp_path / "dst")


def test_too_many_modules(tmp_path):
    src = sentence_encoder(tmp_path / "src", "")
    listed = [{"path": f"m{i}", "type": "x"} for i in range(layouts.MOST_PARTS + 1)]
    (src / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="names more than 1000 modules"):
        quantize_checkpoint(src, tmp_path / "dst")


def test_a_manifest_that_has_a_module_among_the_files(tmp_path):
    """As earlier versions wrote it."""
    src = sentence_encoder(tmp_path / "src", "")
    dst = tmp_path / "dst"
    quantize_checkpoint(src, dst)
    listing = json.loads((dst / "fourbit_manifest.json").read_text())
    entry = listing["tensors"].pop("2_Dense/linear.weight")
    listing["totals"]["tensors"] -= 1
    listing["totals"]["bytes"] -= entry["bytes"]
    from fourbit.checkpoint.manifest import file_entry

    file = dst / "2_Dense" / "model.safetensors"
    listing["files"]["2_Dense/model.safetensors"] = file_entry(file)
    (dst / "fourbit_manifest.json").write_text(json.dumps(listing))
    assert verify_checkpoint(dst).faults == ()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert verify_checkpoint(dst).faults == (f"{file} is not as it was written",)


def test_a_tied_head_in_a_component(src, tmp_path):
    """Its embedding is that of its own model."""
    embedding = torch.randn(50, 64)
    tensors = tensors_of(src / "text_encoder")
    (src / "text_encoder" / "config.json").write_text('{"tie_word_embeddings": true}')
    both = {**tensors, "model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    save_file(both, src / "text_encoder" / "model.safetensors")
    other = tmp_path / "other"
    os.rename(write_pipeline(tmp_path / "fresh"), other)
    (other / "text_encoder" / "config.json").write_text('{"tie_word_embeddings": true}')
    save_file({**tensors, "model.embed_tokens.weight": embedding}, other / "text_encoder" / "model.safetensors")
    found = {t.name: t.name_in_b for t in compare_checkpoints(src, other).tensors}
    assert found["text_encoder/lm_head.weight"] == "text_encoder/model.embed_tokens.weight"


def test_a_component_whose_weights_are_transposed(src, tmp_path):
    """Of transformers' Conv1D in one of the models: its names are known with the folder in front, too."""
    (src / "text_encoder" / "config.json").write_text('{"model_type": "gpt2"}')
    tensors = {"h.0.attn.c_attn.weight": torch.randn(64, 192), "h.0.ln_1.weight": torch.ones(64)}
    save_file(tensors, src / "text_encoder" / "model.safetensors")
    report = quantize_checkpoint(src, tmp_path / "4")
    assert "text_encoder/h.0.attn.c_attn.weight" in {t.name for t in report.plan.quantized}
    with Compound(tmp_path / "4") as four:
        assert four.state("text_encoder/h.0.attn.c_attn.weight").shape == (192, 64)
    dequantize_checkpoint(tmp_path / "4", tmp_path / "16")
    for folder in (tmp_path / "4", tmp_path / "16"):
        compared = {t.name: t for t in compare_checkpoints(src, folder).tensors}
        assert 15 < compared["text_encoder/h.0.attn.c_attn.weight"].sqnr_db < 25
    assert tensors_of(tmp_path / "16" / "text_encoder")["h.0.attn.c_attn.weight"].shape == (64, 192)
