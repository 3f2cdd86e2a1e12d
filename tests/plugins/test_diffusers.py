"""Models of diffusers, there and back through folders."""

from __future__ import annotations

import pytest
import torch

from fourbit.checkpoint.dequantize import dequantize_checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from tests.support import installed, skip_or_fail

if not installed("diffusers"):
    skip_or_fail("diffusers is not installed: pip install 'fourbit[test]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.mark.parametrize("variant", (None, "fp16"))
@pytest.mark.parametrize("size", ("10GB", "50KB"))
def test_there_and_back(tmp_path, variant, size):
    """Under the names that from_pretrained looks for, of one file and of shards; a variant becomes the model itself."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1, "sample_size": 8}
    model = DiTTransformer2DModel(in_channels=4, num_embeds_ada_norm=8, **sizes)
    model.save_pretrained(tmp_path / "src", variant=variant, max_shard_size=size)
    shard = 50_000 if size == "50KB" else 10**9
    packed = quantize_checkpoint(tmp_path / "src", tmp_path / "4", max_shard_size=shard)
    back = dequantize_checkpoint(tmp_path / "4", tmp_path / "16", max_shard_size=shard)
    assert packed.left_out == back.left_out == () and (len(back.files) > 1) == (size == "50KB")
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "16")
    quantized = {t.name for t in packed.plan.quantized}
    assert quantized
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor) == (name not in quantized)
