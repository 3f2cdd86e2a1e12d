"""Models of sentence-transformers in 4 bits: equal embeddings by every way, and after they were saved and loaded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import fourbit
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.nn import Linear4bit, PackedModule
from tests.support import installed, minilm_folder, skip_or_fail

if not installed("sentence-transformers"):
    skip_or_fail("sentence-transformers is not installed: pip install 'fourbit[test]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TEXTS = ["hello", "world of text", "a"]
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]


def save_bert(folder, kind="BertModel"):
    """A tiny BERT with a tokenizer of letters, as transformers saves them."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(VOCABULARY), num_labels=1, **sizes)
    getattr(transformers, kind)(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """BERT, pooling and two dense layers, in float32."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    folder = tmp_path_factory.mktemp("encoder")
    bert = Transformer(save_bert(tmp_path_factory.mktemp("bert")))
    torch.manual_seed(1)
    modules = [bert, Pooling(64), Dense(64, 128), Dense(128, 64, use_residual=True), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return folder


def load(folder, config=None, kind="SentenceTransformer", **options):
    import sentence_transformers

    import fourbit_transformers  # noqa: F401

    if config is not None:
        options["quantization_config"] = config
    return getattr(sentence_transformers, kind)(str(folder), device="cpu", model_kwargs=options)


def encode(model):
    return model.encode(TEXTS, convert_to_tensor=True)


def packed_layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, PackedModule)}


@pytest.mark.parametrize("double_quant", (False, True))
def test_three_ways(encoder, tmp_path, double_quant):
    """On the fly, in memory and by the command; each saved and loaded again without a word."""
    from fourbit_transformers import FourbitConfig

    config = fourbit.QuantConfig(double_quant=double_quant)
    on_the_fly = load(encoder, FourbitConfig(double_quant=double_quant))
    in_memory = fourbit.quantize_model(load(encoder), config)
    quantize_checkpoint(encoder, tmp_path / "command", config)
    by_command = load(tmp_path / "command")
    want = encode(on_the_fly)
    assert packed_layers(on_the_fly) and not torch.equal(encode(load(encoder)), want)
    for number, model in enumerate((on_the_fly, in_memory, by_command)):
        assert packed_layers(model) == packed_layers(on_the_fly) and torch.equal(encode(model), want)
        model.save(str(tmp_path / f"saved{number}"))
        back = load(tmp_path / f"saved{number}")
        assert packed_layers(back) == packed_layers(on_the_fly) and torch.equal(encode(back), want)


def test_its_own_modules_stay(encoder, tmp_path):
    """sentence-transformers reads Dense's weights itself, and would not find packed ones."""
    plain = load(encoder)
    steps = {step.name: step for step in fourbit.plan(plain).tensors}
    for name in ("2.linear.weight", "3.linear.weight"):
        assert steps[name].action == "skip" and not steps[name].large_left
        assert steps[name].rule == "of the module Dense, which sentence-transformers loads itself"
    assert steps["0.model.encoder.layer.0.attention.self.query.weight"].action == "quantize"
    fourbit.quantize_model(plain).save(str(tmp_path / "4"))
    for module in ("2_Dense", "3_Dense"):
        before, after = (load_file(folder / module / "model.safetensors") for folder in (encoder, tmp_path / "4"))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    alone = fourbit.quantize_model(plain[2])
    assert type(alone.linear) is torch.nn.Linear


def test_an_older_layout(encoder, tmp_path):
    """The transformer in a folder of its own, as it was before version 3."""
    from fourbit_transformers import FourbitConfig

    (tmp_path / "old" / "0_Transformer").mkdir(parents=True)
    for file in encoder.rglob("*"):
        name = file.relative_to(encoder)
        whose = len(name.parts) > 1 or name.name in ("modules.json", "config_sentence_transformers.json", "README.md")
        target = tmp_path / "old" / name if whose else tmp_path / "old" / "0_Transformer" / name
        if file.is_file():
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    modules = json.loads((encoder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (tmp_path / "old" / "modules.json").write_text(json.dumps(modules))
    model = load(tmp_path / "old", FourbitConfig())
    assert torch.equal(encode(model), encode(load(encoder, FourbitConfig())))
    model.save(str(tmp_path / "4"))
    assert torch.equal(encode(load(tmp_path / "4")), encode(model))


def test_dtype(encoder, tmp_path):
    from fourbit_transformers import FourbitConfig

    model = load(encoder, FourbitConfig(), dtype=torch.bfloat16)
    layer = model[0].model.encoder.layer[0].attention.self.query
    assert isinstance(layer, Linear4bit) and layer.dtype == torch.bfloat16
    model.save(str(tmp_path / "4"))
    back = load(tmp_path / "4")
    assert back[0].model.dtype == torch.bfloat16 and torch.equal(encode(back), encode(model))


def test_cross_encoder(tmp_path):
    """A BERT that scores pairs: its classifier stays, and the scores are the same after it was saved."""
    from fourbit_transformers import FourbitConfig

    folder = tmp_path / "16"
    save_bert(folder, "BertForSequenceClassification")
    pairs = [("hello", text) for text in TEXTS]
    model = load(folder, FourbitConfig(), "CrossEncoder")
    want = model.predict(pairs)
    in_memory = fourbit.quantize_model(load(folder, kind="CrossEncoder"))
    assert packed_layers(model) == packed_layers(in_memory) != set() and (in_memory.predict(pairs) == want).all()
    assert not any("classifier" in name for name in packed_layers(model))
    for number, each in enumerate((model, in_memory)):
        each.save(str(tmp_path / f"saved{number}"))
        back = load(tmp_path / f"saved{number}", kind="CrossEncoder")
        assert packed_layers(back) == packed_layers(model) and (back.predict(pairs) == want).all()


def test_sparse_encoder(tmp_path):
    """SPLADE: a masked language model whose head makes the embedding."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    from fourbit_transformers import FourbitConfig

    (tmp_path / "bert").mkdir()
    bert = Transformer(save_bert(tmp_path / "bert", "BertForMaskedLM"), transformer_task="fill-mask")
    SparseEncoder(modules=[bert, SpladePooling()], device="cpu").save(str(tmp_path / "16"))
    model = load(tmp_path / "16", FourbitConfig(), "SparseEncoder")
    want = encode(model).to_dense()
    in_memory = fourbit.quantize_model(load(tmp_path / "16", kind="SparseEncoder"))
    assert packed_layers(model) == packed_layers(in_memory) != set()
    assert torch.equal(encode(in_memory).to_dense(), want)
    for number, each in enumerate((model, in_memory)):
        each.save(str(tmp_path / f"saved{number}"))
        back = load(tmp_path / f"saved{number}", kind="SparseEncoder")
        assert packed_layers(back) == packed_layers(model) and torch.equal(encode(back).to_dense(), want)


@pytest.mark.long
def test_minilm(tmp_path):
    """Real weights: close to float32, and the same after they were saved."""
    from fourbit_transformers import FourbitConfig

    texts = ["A man is eating food.", "Someone has a meal.", "The compiler reported an error in line three."]
    folder = minilm_folder()
    if not (folder / "modules.json").is_file():
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

        modules = [Transformer(str(folder)), Pooling(384), Normalize()]
        SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "16"))
        folder = tmp_path / "16"
    plain = load(folder).encode(texts, convert_to_tensor=True)
    model = load(folder, FourbitConfig(double_quant=True))
    got = model.encode(texts, convert_to_tensor=True)
    assert torch.nn.functional.cosine_similarity(plain, got).min() > 0.95
    assert got[0] @ got[1] > got[0] @ got[2] + 0.3
    model.save(str(tmp_path / "4"))
    assert torch.equal(load(tmp_path / "4").encode(texts, convert_to_tensor=True), got)
    assert (tmp_path / "4" / "model.safetensors").stat().st_size < 0.6 * 90_868_376
