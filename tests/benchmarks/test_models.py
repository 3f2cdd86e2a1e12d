"""The benchmarks of whole models, on tiny ones and the CPU: what is compared, and that it runs. No time is asserted."""

import json

import pytest
import torch

from fourbit.nn import ExpertWeights4bit, Linear4bit
from tests.support import need

need("transformers", "peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def library(load):
    return load("harness.bnb").load()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["llama", "moe"])
def test_the_forms_of_a_model_are_one_model(load, library, kind, double):
    models, tiny = load("peers.models"), load("peers.model").TINY[kind]
    config = (models.llama if kind == "llama" else models.qwen3_moe)(2, **tiny)
    made = models.contenders(config, "cpu", library, double)
    assert list(made)[:2] == [models.BF16, models.FOURBIT]
    assert (models.BNB in made) == (library is not None and kind == "llama")
    plain, ours = made[models.BF16], made[models.FOURBIT]
    assert all(each.lm_head.weight.data_ptr() == plain.lm_head.weight.data_ptr() for each in made.values())
    assert type(plain.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert isinstance(ours.model.layers[0].self_attn.q_proj, Linear4bit)
    assert any(isinstance(m, ExpertWeights4bit) for m in ours.modules()) == (kind == "moe")
    assert all(m.double_quant == double for m in ours.modules() if isinstance(m, Linear4bit))
    ids = torch.arange(2, 34).view(2, 16)
    with torch.no_grad():
        # in training, as in evaluation bitsandbytes packs its weights anew on some CPUs
        logits = {who: each.train()(input_ids=ids).logits for who, each in made.items()}
    norm = logits[models.BF16].norm()
    for who, own in logits.items():
        assert (own - logits[models.BF16]).norm() < (1e-6 if who == models.BF16 else 0.5) * norm
    if models.BNB in made:
        assert (logits[models.BNB] - logits[models.FOURBIT]).norm() < 0.05 * norm  # the same codes and scales
        # but for tables, of which each layer has its own
        assert models.nbytes(made[models.BNB]) == pytest.approx(models.nbytes(ours), abs=14 * (1200 if double else 100))
    assert models.nbytes(ours) < 0.6 * models.nbytes(plain)


def test_a_decoding_step_is_that_of_a_cache_without_limits(load):
    from transformers import DynamicCache

    models, step = load("peers.models"), load("peers.decode_step")
    model = models.plain(models.llama(2, **load("peers.model").TINY["llama"]), "cpu")
    with torch.no_grad():
        mine = step.DecodeStep(model, batch=3, context=7, device="cpu")
        other = DynamicCache(config=model.config)
        for index, layer in enumerate(mine.cache.layers):
            other.update(layer.keys[:, :, :7].clone(), layer.values[:, :, :7].clone(), index)
        true = model(input_ids=mine.tokens, use_cache=True, **{models.CACHE: other}).logits
        first = mine.step()
        mine.reset()
        second = mine.step()
    assert torch.equal(first, second)
    assert (first - true).norm() < 0.02 * true.norm()


def test_models_are_measured(load, tmp_path, capsys):
    command = ["--device", "cpu", "--tiny", "--rounds", "2", "--batch", "1,3", "--json", str(tmp_path / "found.json")]
    load("peers.model").main(command)
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [(row["what"].split(",")[0], row["batch"]) for row in rows[:3]] == [("Llama", 1), ("Llama", 3), ("Llama", 1)]
    assert len(rows) == 8  # decode by batch and prefill, twice; generate by batch
    assert all(row["milliseconds"]["fourbit"] > 0 and not row["note"] for row in rows)
    assert capsys.readouterr().out.count("\n| ") == len(rows) + 1


def test_training_steps_are_measured(load, library, tmp_path, capsys):
    command = ["--device", "cpu", "--tiny", "--rounds", "3", "--batch", "2", "--json", str(tmp_path / "found.json")]
    load("peers.training").main(command)
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert {row["case"] for row in rows} == {"2×64", "2×64, checkpointing"}
    assert len(rows) == (4 if library is None else 6)
    for row in rows:
        assert row["wall"] >= row["host"] > 0 and row["losses"][1] < row["losses"][0] < 7
    losses = {(row["case"], row["who"]): row["losses"] for row in rows}
    if library is not None:  # the same codes, scales and adapters
        for case in ("2×64", "2×64, checkpointing"):
            assert losses[case, "fourbit"] == pytest.approx(losses[case, "bitsandbytes"], rel=2e-3)
    assert capsys.readouterr().out.count("\n| ") == len(rows) + 1


def test_the_base_is_the_mean_of_two_turns(load):
    model, training, targets = load("peers.model"), load("peers.training"), load("peers.targets")
    row = model.Row("Llama, decode", 8, {"bf16": 4.0, "fourbit": 3.25, model.AGAIN: 6.0}, targets.DECODE_GPU[8])
    assert row.over_bf16("fourbit") == 0.65
    line = model.line(row, ("bf16", "fourbit", "bitsandbytes"))
    assert line == "| Llama, decode | 8 | 4.00 | 3.25 | – | 0.65 | – | ≤ 0.66: met |  |"
    assert len(model.heading(("bf16", "fourbit", "bitsandbytes")).splitlines()[0].split("|")) == len(line.split("|"))

    def trainee(wall):
        return training.Trainee(None, None, 0, wall=wall, host=[1.0], losses=[2.0, 1.0])

    found = training.rows("1×64", {"bf16": trainee([9.0, 10.0, 11.0]), "fourbit": trainee([22.0])}, [30.0])
    assert [row.of_bf16 for row in found] == [0.5, 1.1]
    assert "≤ 1.03: MISSED" in training.table(found).splitlines()[-1]
