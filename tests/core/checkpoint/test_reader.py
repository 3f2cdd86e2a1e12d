"""Reading folders of safetensors, also hostile ones."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fourbit
from fourbit.checkpoint import Checkpoint, CheckpointError, compare, untrusted
from fourbit.checkpoint.compound import Compound
from fourbit.checkpoint.inspect import inspect_checkpoint
from tests.folders import sample_tensors, write_folder, write_index


@pytest.mark.parametrize("shards", (1, 3))
def test_plain_folder(tmp_path, shards):
    tensors = sample_tensors()
    folder = write_folder(tmp_path / "m", tensors, shards)
    with Checkpoint(folder) as checkpoint:
        assert set(checkpoint.entries) == set(tensors)
        assert len(checkpoint.files) == shards
        assert checkpoint.config["model_type"] == "llama"
        assert not checkpoint.quantized()
        for name, tensor in tensors.items():
            info = checkpoint.entries[name]
            assert (info.dtype, info.shape, info.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
            assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.nbytes == sum(t.nbytes for t in tensors.values())


def test_single_file_and_index_file(tmp_path):
    folder = write_folder(tmp_path / "m", shards=2)
    assert len(Checkpoint(folder / "model.safetensors.index.json").entries) == len(sample_tensors())
    assert 0 < len(Checkpoint(folder / "model-00001-of-00002.safetensors").entries) < len(sample_tensors())


def test_single_file_of_another_name(tmp_path):
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert len(Checkpoint(folder).entries) == len(sample_tensors())
    save_file({"x": torch.zeros(2)}, folder / "other.safetensors")
    with pytest.raises(CheckpointError, match="2 candidates .*name one of them"):
        Checkpoint(folder)


@pytest.mark.parametrize("double_quant", (False, True))
@pytest.mark.parametrize("shape", ((7, 33), (1,), (3, 5, 7), (128, 512)))
def test_4bit_weight(tmp_path, shape, double_quant):
    w = torch.randn(*shape).bfloat16()
    packed, state = fourbit.quantize_4bit(w, quant_type="fp4", blocksize=32, double_quant=double_quant)
    path = tmp_path / "a.safetensors"
    save_file({"a.weight": packed, **state.to_state_dict("a.weight."), "a.bias": torch.zeros(3)}, path)
    checkpoint = Checkpoint(path)
    assert list(checkpoint.quantized()) == ["a.weight"]
    assert "a.bias" not in checkpoint.companions() and "a.weight.absmax" in checkpoint.companions()
    packed_again, state_again = checkpoint.read_4bit("a.weight")
    assert torch.equal(packed, packed_again)
    assert torch.equal(fourbit.dequantize_4bit(packed_again, state_again), fourbit.dequantize_4bit(packed, state))
    with pytest.raises(CheckpointError, match="'a.bias' is not a 4-bit weight"):
        checkpoint.read_4bit("a.bias")
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        checkpoint.read_4bit("b")


@pytest.mark.parametrize("storage", (torch.bfloat16, torch.float32))
def test_packed_in_a_wider_dtype(tmp_path, storage):
    w = torch.randn(16, 66)
    packed, state = fourbit.quantize_4bit(w)
    path = tmp_path / "a.safetensors"
    save_file({"w": packed.view(-1).view(storage).view(-1, 1), **state.to_state_dict("w.")}, path)
    assert torch.equal(Checkpoint(path).read_4bit("w")[0], packed)


HOSTILE_FILES = (
    "../outside.safetensors",
    "/etc/outside.safetensors",
    "sub/model.safetensors",
    "..\\outside.safetensors",
    "c:outside.safetensors",
    "..",
    "",
    "model.bin",
    "a\0.safetensors",
    3,
    None,
    ["model.safetensors"],
)


@pytest.mark.parametrize("file", HOSTILE_FILES)
def test_index_that_points_elsewhere(tmp_path, file):
    folder = write_folder(tmp_path / "m", shards=2)
    save_file({"x": torch.zeros(2)}, tmp_path / "outside.safetensors")
    write_index(folder, {"x": file})
    with pytest.raises(CheckpointError, match="not the plain name of a"):
        Checkpoint(folder)


def test_missing_shard_and_tensor(tmp_path):
    folder = write_folder(tmp_path / "m", shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    write_index(folder, index["weight_map"] | {"ghost.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match="lacks the tensor 'ghost.weight'"):
        Checkpoint(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names the shard model-00002-of-00002.safetensors, which is missing"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ("", "{", "[]", "3", "null", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000))
def test_broken_index(tmp_path, text):
    folder = write_folder(tmp_path / "m", shards=2)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        Checkpoint(folder)


def test_broken_config(tmp_path):
    folder = write_folder(tmp_path / "m")
    (folder / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        _ = Checkpoint(folder).config


def test_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no .safetensors file"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="it has pytorch_model.bin, and fourbit reads safetensors only"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder nor"):
        Checkpoint(tmp_path / "pytorch_model.bin")


def test_truncated(tmp_path):
    folder = write_folder(tmp_path / "m")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for length in (0, 4, 8, 100, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read as safetensors"):
            Checkpoint(folder)
    file.write_bytes(data + b"x")
    with pytest.raises(CheckpointError):
        Checkpoint(folder)


def test_unsupported_type(tmp_path):
    header = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(CheckpointError, match="'x' has the unsupported type F4"):
        Checkpoint(path)


def _packed_file(path):
    packed, state = fourbit.quantize_4bit(torch.randn(16, 64), double_quant=True)
    save_file({"w": packed, **state.to_state_dict("w.")}, path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    (
        ("w", None, "the weight 'w' is not"),
        ("w", torch.zeros(511, 1, dtype=torch.uint8), "'w' has 511 bytes"),
        ("w.absmax", None, "w.absmax is missing"),
        ("w.absmax", torch.zeros(16), "w.absmax: want torch.uint8 with 16"),
        ("w.nested_absmax", torch.zeros(2), "w.nested_absmax: want"),
        ("w.quant_map", torch.zeros(16), "not the table"),
        ("w.extra", torch.zeros(16), "unexpected key w.extra"),
        ("w.quant_state.bitsandbytes__fp4", torch.zeros(3, dtype=torch.uint8), "want exactly one key"),
        ("w.quant_state.bitsandbytes__nf4", torch.zeros(70_000, dtype=torch.uint8), "70000 bytes of JSON"),
        ("w.quant_state.bitsandbytes__nf4", torch.zeros(3), "want a 1-D uint8"),
    ),
)
def test_4bit_weight_that_does_not_fit(tmp_path, key, value, message):
    path = tmp_path / "w.safetensors"
    _packed_file(path)
    tensors = load_file(path)
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(path).read_4bit("w")
    with pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset", "more")
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(FIELDS, JSON, min_size=1, max_size=3), cut=st.integers(0, 400))
@example(changes={"shape": [2**40, 2**40]}, cut=400)
@example(changes={"shape": [1 << 61]}, cut=400)
@example(changes={"blocksize": True}, cut=400)
@example(changes={"nested_offset": 1e400}, cut=400)
def test_corrupted_state(tmp_path, changes, cut):
    """Either the very weight that was written comes back, or a CheckpointError; nothing else, and no crash."""
    path = tmp_path / "w.safetensors"
    w = torch.ones(16, 64)
    packed, state = fourbit.quantize_4bit(w, double_quant=True)
    tensors = {"w": packed, **state.to_state_dict("w.")}
    key = "w.quant_state.bitsandbytes__nf4"
    meta = json.loads(bytes(tensors[key].tolist()))
    data = json.dumps(meta | changes).encode()[:cut]
    tensors[key] = torch.tensor(list(data), dtype=torch.uint8)
    save_file(tensors, path)
    try:
        packed_again, state_again = Checkpoint(path).read_4bit("w")
    except CheckpointError as error:
        assert "w.quant_state" in str(error) or "'w'" in str(error) or "w." in str(error)
        return
    assert torch.equal(packed_again, packed)
    assert state_again.numel == 1024  # its shape may have been changed to one of as many elements


def test_a_repeated_name_is_found_in_linear_time():
    """Counted, not timed: how often names are looked up."""

    class Name(str):
        __slots__ = ()
        count = 0

        def __hash__(self):
            Name.count += 1
            return str.__hash__(self)

    names = [Name(f"l.{i}.weight") for i in range(1000)]
    with pytest.raises(ValueError, match="has the name 'l.999.weight' twice"):
        untrusted.unique_names([(name, 0) for name in [*names, names[-1]]])
    assert Name.count <= 10 * len(names)


def test_tied_heads_are_found_in_linear_time(tmp_path):
    """A stranger's header may have any number of heads: the embedding is sought once for all of them."""

    class Name(str):
        __slots__ = ()
        count = 0

        def endswith(self, *arguments):
            Name.count += 1
            return str.endswith(self, *arguments)

    folder = write_folder(tmp_path / "m")
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    source = Compound(folder)
    names = {Name(f"{i}.wte.weight"): (1,) for i in range(50)}
    heads = [f"{i}.lm_head.weight" for i in range(50)]
    tied = compare._tied_embeddings(source, names)
    assert [compare._counterpart(head, source, names, tied) for head in heads] == [None] * 50
    assert Name.count == 50
