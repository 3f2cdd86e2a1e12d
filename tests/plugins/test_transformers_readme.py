"""The recipes of plugins/fourbit_transformers/README.md, run as they stand, with tiny models for large ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fourbit.nn import Linear4bit
from tests.support import installed, skip_or_fail

for needed in ("transformers", "accelerate", "bitsandbytes", "sentence-transformers", "peft"):
    if not installed(needed):
        skip_or_fail(f"{needed} is not installed, which a recipe uses: pip install 'fourbit[test-full]' bitsandbytes")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

README = Path(__file__).parents[2] / "plugins" / "fourbit_transformers" / "README.md"
SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def folders() -> None:
    """What the recipes take from the Hub, here in folders of those names."""
    import transformers
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).bfloat16().save_pretrained("meta-llama/Llama-3.2-1B")
    theirs = LlamaForCausalLM.from_pretrained(
        "meta-llama/Llama-3.2-1B", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    theirs.save_pretrained("Llama-bnb")
    bert = transformers.BertModel(transformers.BertConfig(**SIZES, num_attention_heads=4))
    bert.save_pretrained("bert")
    Path("bert/vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    transformers.BertTokenizer("bert/vocab.txt").save_pretrained("bert")
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(modules=[Transformer("bert"), Pooling(64)]).save("all-MiniLM-L6-v2")
    config = transformers.Qwen3MoeConfig(
        **SIZES, **HEADS, head_dim=16, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained("moe")


def test_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders()
    import peft

    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 6
    names: dict = {"peft": peft, "folder": "moe"}
    ours = []
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
        module = names["encoder"] if "encoder" in block else names["model"]
        ours.append(any(isinstance(part, Linear4bit) for part in module.modules()))
    assert ours == [True, True, True, False, True, True]  # the fourth has bitsandbytes read
    texts = ["abc", "hgfe"]
    again = names["SentenceTransformer"]("minilm-4bit")
    assert torch.equal(*(torch.as_tensor(each.encode(texts)) for each in (names["encoder"], again)))
    assert names["model"].get_nb_trainable_parameters()[0] > 0
