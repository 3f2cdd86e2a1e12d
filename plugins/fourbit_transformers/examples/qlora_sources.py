"""What the QLoRA example trains: a model in a 16-bit folder with its tokenizer, and text in two disjoint parts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fourbit_demo import sample_model, sample_text

TRAIN_CHARACTERS = 240_000


def texts() -> tuple[str, str]:
    """Text to train on and text to evaluate on: Python's help topics, those of `fourbit demo` being the latter."""
    held_out, _ = sample_text.read_text()
    from pydoc_data.topics import topics

    others = "\n\n".join(topics[name] for name in sorted(set(topics) - set(sample_text.TOPICS)))
    return others[:TRAIN_CHARACTERS], held_out


def model_folder(work: Path, small: bool) -> Path:
    """The 16-bit folder in `work`, made where it is missing: SmolLM2-135M-Instruct, or a tiny Llama that knows nothing.

    Raises SampleModelError if SmolLM2's weights cannot be had.
    """
    folder = work / ("tiny-llama" if small else sample_model.MODEL)
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.part")  # a run that is interrupted leaves no half of a folder
        shutil.rmtree(part, ignore_errors=True)
        if small:
            _tiny(part)
        else:
            sample_model.convert(sample_model.find_weights()[0], part)
        part.rename(folder)
    return folder


def _tiny(folder: Path) -> None:
    """A Llama of two layers with random weights, and a tokenizer of bytes and a few of their pairs."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([texts()[0][:20_000]], trainer)
    fast: Any = PreTrainedTokenizerFast
    wrapped = fast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "initializer_range": 0.1,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    config = LlamaConfig(vocab_size=len(wrapped), bos_token_id=None, eos_token_id=0, pad_token_id=1, **sizes, **heads)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    wrapped.save_pretrained(folder)
