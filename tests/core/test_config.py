"""QuantConfig: its fields are checked, its skip patterns match as users write them, and it survives JSON."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourbit import QuantConfig
from fourbit.config import as_compute_dtype


def test_defaults():
    config = QuantConfig()
    assert (config.quant_type, config.blocksize, config.double_quant) == ("nf4", None, False)
    assert config.compute_dtype is None and config.skip_modules == ()


def test_is_frozen_hashable_and_comparable():
    config = QuantConfig(blocksize=64, skip_modules=["lm_head"])
    assert config == QuantConfig(blocksize=64, skip_modules=("lm_head",))
    assert hash(config) == hash(QuantConfig(blocksize=64, skip_modules=("lm_head",)))
    with pytest.raises(FrozenInstanceError):
        config.blocksize = 128


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"quant_type": "nf5"}, ValueError, "unknown quant_type 'nf5'"),
        ({"quant_type": 4}, TypeError, "quant_type"),
        ({"blocksize": 63}, ValueError, "blocksize"),
        ({"blocksize": 16}, ValueError, "blocksize"),
        ({"blocksize": 8192}, ValueError, "blocksize"),
        ({"blocksize": -64}, ValueError, "blocksize"),
        ({"blocksize": True}, TypeError, "blocksize"),
        ({"blocksize": 64.0}, TypeError, "blocksize"),
        ({"blocksize": "64"}, TypeError, "blocksize"),
        ({"double_quant": 1}, TypeError, "double_quant"),
        ({"double_quant": None}, TypeError, "double_quant"),
        ({"compute_dtype": torch.float64}, ValueError, "compute_dtype"),
        ({"compute_dtype": torch.int8}, ValueError, "compute_dtype"),
        ({"compute_dtype": "bf16"}, ValueError, "compute_dtype 'bf16'"),
        ({"compute_dtype": 16}, TypeError, "compute_dtype"),
        ({"skip_modules": "lm_head"}, TypeError, "skip_modules"),
        ({"skip_modules": [1]}, TypeError, "skip_modules"),
        ({"skip_modules": [""]}, TypeError, "skip_modules"),
    ],
)
def test_fields_are_checked(fields, error, message):
    with pytest.raises(error, match=message):
        QuantConfig(**fields)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_every_blocksize(blocksize):
    assert QuantConfig(blocksize=blocksize).blocksize == blocksize


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_compute_dtype_by_name(name):
    dtype = getattr(torch, name)
    assert as_compute_dtype(name) == as_compute_dtype(f"torch.{name}") == as_compute_dtype(dtype) == dtype
    assert QuantConfig(compute_dtype=name) == QuantConfig(compute_dtype=dtype)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("v_proj", "model.layers.0.self_attn.v_proj", True),
        ("self_attn", "model.layers.0.self_attn.v_proj", True),
        ("proj", "model.layers.0.self_attn.v_proj", False),
        ("*.v_proj", "model.layers.0.self_attn.v_proj", True),
        ("model.layers.0.*", "model.layers.0.self_attn.v_proj", True),
        ("model.layers.0.*", "model.layers.10.self_attn.v_proj", False),
        ("model.layers.[01].*", "model.layers.1.mlp", True),
        ("layers.0", "model.layers.0", False),
        ("*", "anything", True),
        ("V_proj", "v_proj", False),
    ],
)
def test_skip_patterns(pattern, name, matches):
    assert QuantConfig(skip_modules=[pattern]).skips(name) == (pattern if matches else None)


def test_the_first_pattern_that_matches_is_named():
    config = QuantConfig(skip_modules=["other", "*head", "lm_head"])
    assert config.skips("lm_head") == "*head" and config.skips("") is None


configs = st.builds(
    QuantConfig,
    quant_type=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from([None, 32, 64, 128, 4096]),
    double_quant=st.booleans(),
    compute_dtype=st.sampled_from([None, torch.bfloat16, torch.float16, torch.float32]),
    skip_modules=st.lists(st.text(min_size=1, max_size=5), max_size=3),
)


@given(configs)
def test_survives_json(config):
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_refuses_what_it_does_not_know():
    assert QuantConfig.from_dict({"double_quant": True}) == QuantConfig(double_quant=True)
    with pytest.raises(ValueError, match="unknown field 'bits'.*quant_type"):
        QuantConfig.from_dict({"bits": 4})
    with pytest.raises(ValueError, match="blocksize"):
        QuantConfig.from_dict({"blocksize": 1})
