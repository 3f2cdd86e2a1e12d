"""A real, unquantized model: MiniLM's sentence encoder (22.7M parameters, float32) in 4 bits."""

import pytest
import torch
from torch.nn import functional

import fourbit
from fourbit.nn import Linear4bit
from tests.support import minilm_folder, skip_or_fail

try:
    import transformers
except ImportError:
    skip_or_fail("transformers is not installed: pip install 'fourbit[test]'")

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
SENTENCES = [
    "A man is eating food.",
    "Someone has a meal.",
    "The girl is carrying a baby.",
    "A cheetah chases its prey across a field.",
    "Quantization stores weights in fewer bits.",
    "The compiler reported an error in line three.",
]


@pytest.fixture(scope="module")
def encoder():
    folder = minilm_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def encode(model):
        batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    return folder, encode


def load_plain(folder):
    return transformers.AutoModel.from_pretrained(folder).eval()


# Least cosine similarity with the float32 embedding over the sentences. Seen: nf4 0.9693 and 0.9690, fp4 0.9452.
CONFIGS = {
    "nf4": (fourbit.QuantConfig(), 0.95),
    "nf4 double": (fourbit.QuantConfig(double_quant=True), 0.95),
    "fp4": (fourbit.QuantConfig(quant_type="fp4"), 0.92),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_sentence_embeddings_stay_close(encoder, name):
    folder, encode = encoder
    config, least = CONFIGS[name]
    want = encode(load_plain(folder))
    model = fourbit.quantize_model(load_plain(folder), config, strict=True)
    got = encode(model)
    similarity = (want * got).sum(-1)
    print(f"{name}: least similarity {similarity.min():.4f}")
    assert similarity.min() > least
    # what is near stays nearest: the first two sentences say the same
    assert int((got[0] @ got[1:].T).argmax()) == 0
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 6 * 6 + 1  # six layers of six, and the pooler


def test_through_a_folder_and_back(encoder, tmp_path):
    from fourbit.checkpoint.quantize import quantize_checkpoint
    from fourbit_transformers import load

    folder, encode = encoder
    report = quantize_checkpoint(folder, tmp_path / "small", fourbit.QuantConfig(double_quant=True))
    model = load(tmp_path / "small")
    in_memory = fourbit.quantize_model(load_plain(folder), fourbit.QuantConfig(double_quant=True))
    torch.testing.assert_close(encode(model), encode(in_memory))
    assert round(report.plan.bits_per_quantized_parameter, 2) == 4.13
