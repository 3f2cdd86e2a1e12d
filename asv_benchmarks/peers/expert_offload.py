"""A QLoRA step of a mixture of experts with its packed experts on the device, and with them in host memory.

    python -m peers.expert_offload               # CUDA: 8B parameters of which 1B are active, 1×2048 tokens
    python -m peers.expert_offload --layers 16   # OLMoE's size, 7B
    python -m peers.expert_offload --small       # a look at any machine, also without CUDA

The model is a Qwen3-MoE with random weights, made in 4 bits straight away. LoRA (r 16) on the attention, gradient
checkpointing, AdamW. Peaks are torch's count of allocated bytes. Beside them, from the shapes alone, what such a step
should hold, for this model and for Qwen3-30B-A3B.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched by name
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import peft
import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import fourbit
from fourbit.nn import PackedModule
from fourbit_transformers.expert_offload import offload_experts
from fourbit_transformers.expert_stream import KEPT
from fourbit_transformers.experts import use_fourbit_experts
from harness import machine

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK = 16
BLOCKSIZE = 64
MEASURED = {
    **{"vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16},
    **{"num_key_value_heads": 16, "head_dim": 128, "num_experts": 64, "num_experts_per_tok": 8},
    **{"moe_intermediate_size": 1024, "intermediate_size": 1024},
}
QWEN3_30B_A3B = {
    **{"vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32},
    **{"num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8},
    **{"moe_intermediate_size": 768, "intermediate_size": 6144},
}
SMALL = {
    **{"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 64, "intermediate_size": 64},
}


def build(sizes: dict[str, int], device: torch.device, offload: bool) -> nn.Module:
    """The model in 4 bits with random weights, never in 16 bit as a whole, with adapters on its attention."""
    config = Qwen3MoeConfig(**sizes)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    fourbit.quantize_model(model, fourbit.QuantConfig(blocksize=BLOCKSIZE))
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        if isinstance(module, PackedModule):
            fill(module, device, generator)
            if offload and module.kind == "experts":
                module.to("cpu")
        else:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    value = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
                    if parameter.dim() > 1:
                        value.normal_(std=0.02, generator=generator)
                    setattr(module, name, nn.Parameter(value, requires_grad=False))
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    use_fourbit_experts(model)
    if offload:
        offload_experts(model, device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=list(ATTENTION))).train()


def fill(module: PackedModule, device: torch.device, generator: torch.Generator) -> None:
    """Random codes, with scales that give weights of a usual size."""
    shape, scales = module.qweight.shape, module.scales.shape
    like = type(module).like(stand_in(module), fourbit.QuantConfig(blocksize=BLOCKSIZE), module.dtype, device)
    like.qweight.copy_(torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator))
    like.scales.copy_(torch.full(scales, 0.04, device=device).view(torch.int32))
    module._parameters.update(like._parameters)
    module._buffers.update(like._buffers)


def stand_in(module: PackedModule) -> Any:
    """What a module of this kind takes the place of, on the meta device."""
    if module.kind == "experts":
        return torch.empty(module.weight_shape, device="meta")
    return nn.Linear(module.weight_shape[1], module.weight_shape[0], bias=False, device="meta")


def measure(model: nn.Module, device: torch.device, tokens: int, steps: int) -> dict[str, Any]:
    """Seconds a step, the loss of the first, and the device's peak, over `steps` after two that are not counted."""
    cuda = device.type == "cuda"
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (1, tokens), generator=generator).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses, seconds = [], []
    for _ in range(2 + steps):
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds[2:]),
        "losses": losses[:2],
        "peak": torch.cuda.max_memory_allocated(device) if cuda else None,
        "reserved": torch.cuda.max_memory_reserved(device) if cuda else None,
    }


def arithmetic(sizes: dict[str, int], tokens: int) -> dict[str, float]:
    """Bytes that a step holds, from the shapes: packed weights with float32 scales, 16-bit activations."""
    packed = 0.5 + 4 / BLOCKSIZE
    hidden, layers, width = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["moe_intermediate_size"]
    queries = sizes["num_attention_heads"] * sizes["head_dim"]
    keys = sizes["num_key_value_heads"] * sizes["head_dim"]
    attention = hidden * (2 * queries + 2 * keys)
    rows = tokens * sizes["num_experts_per_tok"]
    logits = tokens * sizes["vocab_size"]
    experts = sizes["num_experts"] * 3 * hidden * width
    factors = RANK * (4 * hidden + 2 * queries + 2 * keys) * layers
    return {
        "packed experts, a layer": experts * packed,
        "packed experts, all": experts * packed * layers,
        "copies of experts on the device": experts * packed * KEPT / 2,
        "attention, packed": attention * packed * layers,
        "embedding, head, routers": (2 * sizes["vocab_size"] * hidden + sizes["num_experts"] * hidden * layers) * 2,
        "adapters, gradients, AdamW (float32)": factors * 16,
        "inputs of all layers": tokens * hidden * layers * 2,
        "one layer again: its experts' rows": rows * (4 * hidden + 5 * width) * 2,
        # 16-bit logits; float32, their log-softmax and its gradient
        "logits and their loss": logits * 14,
    }


def totals(parts: dict[str, float]) -> tuple[float, float]:
    """Bytes on the device with the experts there, and in host memory."""
    experts = ("packed experts, a layer", "packed experts, all", "copies of experts on the device")
    others = sum(size for name, size in parts.items() if name not in experts)
    # the logits are gone when a layer is computed again
    others -= min(parts["one layer again: its experts' rows"], parts["logits and their loss"])
    return others + parts["packed experts, all"], others + parts["copies of experts on the device"]


def print_arithmetic(name: str, sizes: dict[str, int], tokens: int) -> None:
    """The table of one model."""
    parts = arithmetic(sizes, tokens)
    print(f"\n{name}, 1×{tokens} tokens, from the shapes:")
    for part, size in parts.items():
        print(f"  {part:<40} {size / 1e6:>10,.0f} MB")
    for what, size in zip(("experts on the device", "experts in host memory"), totals(parts), strict=True):
        print(f"  {'device, ' + what:<40} {size / 1e9:>10.2f} GB")


def main(argv: list[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m peers.expert_offload", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--layers", type=int, help=f"of the measured model (default {MEASURED['num_hidden_layers']})")
    parser.add_argument("--tokens", type=int, help="of the one sequence (default 2048)")
    parser.add_argument("--steps", type=int, default=5, help="that are measured")
    parser.add_argument("--json", metavar="FILE", help="write what was measured there too")
    options = parser.parse_args(argv)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and not options.small:
        parser.error("the measurement needs CUDA; --small runs anywhere")
    sizes = dict(SMALL if options.small else MEASURED)
    sizes["num_hidden_layers"] = options.layers or sizes["num_hidden_layers"]
    tokens = options.tokens or (64 if options.small else 2048)
    about = machine.about()
    machine.print_about(about)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    print(f"{gpu}; {sizes['num_hidden_layers']} layers of {sizes['num_experts']} experts, 1×{tokens} tokens")
    found: dict[str, Any] = {}
    for name, offload in (("experts on the device", False), ("experts in host memory", True)):
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        model = build(sizes, device, offload)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)  # of training, not of making the model
        found[name] = measure(model, device, tokens, options.steps)
        del model
    parts = totals(arithmetic(sizes, tokens))
    print(f"\n{'':<24} {'ms a step':>10} {'peak, GB':>10} {'reserved':>10} {'from shapes':>12}   losses of steps 1, 2")
    for (name, row), expected in zip(found.items(), parts, strict=True):
        peak, reserved = ("—" if row[k] is None else f"{row[k] / 1e9:.2f}" for k in ("peak", "reserved"))
        losses = ", ".join(f"{loss:.4f}" for loss in row["losses"])
        print(f"{name:<24} {row['seconds'] * 1e3:>10.0f} {peak:>10} {reserved:>10} {expected / 1e9:>12.2f}   {losses}")
    print_arithmetic("The measured model", sizes, tokens)
    print_arithmetic("Qwen3-30B-A3B", QWEN3_30B_A3B, 2048)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as stream:
            json.dump({**about, "gpu": gpu, "sizes": sizes, "tokens": tokens, "rows": found}, stream, indent=1)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the libraries' own
    main()
