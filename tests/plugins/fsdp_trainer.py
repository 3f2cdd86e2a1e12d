"""QLoRA with transformers' Trainer under torchrun: FSDP2 by accelerate, or one process. Run as a program.

    python -m torch.distributed.run --nproc-per-node 2 tests/plugins/fsdp_trainer.py FOLDER NAME [--steps 20]
    python tests/plugins/fsdp_trainer.py FOLDER NAME

On CPUs with gloo, on GPUs (`--device cuda`) with NCCL. FOLDER/plain has the model; FOLDER/NAME.pt will have the losses
and the full state dict; FOLDER/NAME the checkpoints. With --resume it goes on from the last of FOLDER/RESUME.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path

import accelerate
import torch
import transformers as T
from peft import LoraConfig, get_peft_model

from fourbit_transformers import FourbitConfig

GLOBAL_BATCH = 4
FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


class Rows(torch.utils.data.Dataset):
    def __init__(self, count, vocabulary):
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(5, vocabulary, (count, 12), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class InOrder(T.Trainer):
    """Rows in order, so that the same ones make a step however many processes there are."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def full_state(model):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--resume")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    many = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    training = T.TrainingArguments(
        output_dir=str(options.folder / options.name),
        max_steps=options.steps,
        per_device_train_batch_size=GLOBAL_BATCH // many,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=options.steps // 2,
        use_cpu=options.device == "cpu",
        report_to=[],
        seed=0,
        disable_tqdm=True,
        max_grad_norm=1.0,
        average_tokens_across_devices=False,
        **({"fsdp": True, "fsdp_config": FSDP2} if many > 1 else {}),
    )
    if many > 1 and options.device == "cpu":  # where accelerate takes DDP, whatever is asked for: its FSDP2 runs there
        accelerate.PartialState._shared_state["distributed_type"] = accelerate.DistributedType.MULTI_GPU
    device = {"": training.device if options.device != "cpu" else "cpu"}
    model = T.AutoModelForCausalLM.from_pretrained(
        options.folder / "plain",
        quantization_config=FourbitConfig(double_quant=True, blocksize=64),
        device_map=device,
        dtype=torch.float32,
    )
    before = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0))
    trainer = InOrder(model=model, args=training, train_dataset=Rows(GLOBAL_BATCH * options.steps, 100))
    last = None if options.resume is None else str(options.folder / options.resume / f"checkpoint-{options.steps // 2}")
    trainer.train(resume_from_checkpoint=last)
    sharded = [hasattr(p, "device_mesh") for name, p in trainer.model_wrapped.named_parameters() if "qweight" in name]
    assert sharded and all(sharded) == (many > 1) == any(sharded)
    state = full_state(trainer.model_wrapped if many > 1 else trainer.model)
    if training.process_index == 0:
        frozen = {name.replace("base_model.model.", "").replace("base_layer.", ""): t for name, t in state.items()}
        changed = [
            name
            for name, tensor in before.items()
            if not torch.equal(frozen[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
        ]
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        adapters = {name: t for name, t in state.items() if "lora_" in name}
        torch.save({"losses": losses, "adapters": adapters, "changed": changed}, options.folder / f"{options.name}.pt")
        print(json.dumps({"processes": many, "losses": losses[:2] + losses[-2:], "changed": changed}), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # gloo's threads may outlive the group


if __name__ == "__main__":
    main()
