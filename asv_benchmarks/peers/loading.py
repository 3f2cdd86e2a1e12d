"""Loads a generated Llama with transformers, 16-bit and 4-bit, and prints times and peak memory beside their bounds.

    python -m peers.loading [--size-gb 1] [--device cuda] [--rounds 3]

The folder is bfloat16, in several files. Each load has a process of its own, all are taken in turn, and the figures
are medians. The seconds are those of from_pretrained, and of a look at every page of the model: on a CPU transformers
maps files, and a load that reads nothing is no load. The files are in the system's cache. Memory is what the whole
process had at most: anonymous pages (RssAnon, read by the parent every few milliseconds), all resident pages
(VmHWM, mapped files among them), and on a GPU what torch allocated there. bitsandbytes takes part where it is
installed, and reads the very 4-bit folder that fourbit wrote. The exit status is 1 if a bound on memory is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

FILES = 4
SAMPLE_SECONDS = 0.003
PAGE = 4096
SLACK = 300_000_000
TENSORS = 3
ON_THE_FLY = 1.3

EMPTY, SIXTEEN = "transformers, nothing loaded", "16 bit"
FLY, FOLDER = "fourbit, on the fly", "fourbit, 4-bit folder"
BNB_FLY, BNB_FOLDER = "bitsandbytes, on the fly", "bitsandbytes, 4-bit folder"
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def make_source(folder: Path, nbytes: int) -> int:
    """A Llama of about `nbytes` in `FILES` files; returns the bytes of its largest tensor."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    width = 2048 if nbytes >= 500_000_000 else 512
    inner, grouped, words = width * 11 // 4, width // 2, width * 16
    block = 2 * width * width + 2 * grouped * width + 3 * inner * width
    layers = max(FILES, (nbytes // 2 - 2 * words * width) // block)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=grouped // 128,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    torch.manual_seed(0)
    row = torch.randn(1 << 20).bfloat16() * 0.02

    def weight(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return row.repeat(-(-count // len(row)))[:count].view(shape).clone()

    weight_map: dict[str, str] = {}
    for i in range(FILES):
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(layers * i // FILES, layers * (i + 1) // FILES):
            name = f"model.layers.{layer}"
            for part, shape in {"q": (width, width), "k": (grouped, width), "v": (grouped, width)}.items():
                tensors[f"{name}.self_attn.{part}_proj.weight"] = weight(*shape)
            tensors[f"{name}.self_attn.o_proj.weight"] = weight(width, width)
            tensors[f"{name}.mlp.gate_proj.weight"] = weight(inner, width)
            tensors[f"{name}.mlp.up_proj.weight"] = weight(inner, width)
            tensors[f"{name}.mlp.down_proj.weight"] = weight(width, inner)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{name}.{norm}.weight"] = torch.ones(width).bfloat16()
        if i == 0:
            tensors["model.embed_tokens.weight"] = weight(words, width)
        if i == FILES - 1:
            tensors["lm_head.weight"] = weight(words, width)
            tensors["model.norm.weight"] = torch.ones(width).bfloat16()
        file = f"model-{i + 1:05d}-of-{FILES:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return max(words, inner) * width * 2


def load(case: str, folder: str, device: str) -> dict[str, Any]:
    """In a process of its own: load, and say how long it took and how large the model is."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM  # noqa: F401

    more: dict[str, Any] = {}
    if case in (FLY, FOLDER):
        from fourbit_transformers import FourbitConfig

        more = {"quantization_config": FourbitConfig(blocksize=64)} if case == FLY else {}
    elif case in (BNB_FLY, BNB_FOLDER):
        import bitsandbytes  # noqa: F401

        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        more = {"quantization_config": config} if case == BNB_FLY else {}
    on_gpu = device != "cpu"
    if on_gpu:
        torch.zeros(1, device=device)
        torch.cuda.synchronize()
    found: dict[str, Any] = {"seconds": 0.0, "cpu": 0.0, "bytes": 0, "device_peak": 0, "kind": ""}
    if case != EMPTY:
        begin, before = time.perf_counter(), time.process_time()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device}, **more)
        tensors = [*model.parameters(), *model.buffers()]
        states = [state for t in tensors if (state := getattr(t, "quant_state", None)) is not None]
        tensors += [t for state in states for t in (state.absmax, state.code)]  # bitsandbytes', beside the parameters
        for tensor in tensors:
            tensor.detach().reshape(-1).view(torch.uint8)[::PAGE].sum()
        if on_gpu:
            torch.cuda.synchronize()
        found["seconds"], found["cpu"] = time.perf_counter() - begin, time.process_time() - before
        found["bytes"] = sum(t.nbytes for t in tensors)
        found["kind"] = type(model.model.layers[0].mlp.up_proj).__module__
    if on_gpu:
        found["device_peak"] = torch.cuda.max_memory_allocated()
    return found


@dataclass
class Case:
    """A way of loading, and what its processes said."""

    name: str
    folder: Path
    kind: str
    """The package of the layers that it has to give, so that no column says another's name."""
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Seconds of all threads, which say more than the clock where others are busy too."""
    peaks: list[int] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    device_peaks: list[int] = field(default_factory=list)
    nbytes: int = 0

    def run(self, device: str) -> None:
        """Once more, in a fresh process."""
        command = [sys.executable, "-m", "peers.loading", "--child", self.name, str(self.folder), "--device", device]
        with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(command, stdout=said, stderr=errors, env={**os.environ, **QUIET})
            peak = resident = 0
            while child.poll() is None:
                anonymous, high = _memory(child.pid)
                peak, resident = max(peak, anonymous), max(resident, high)
                time.sleep(SAMPLE_SECONDS)
            if child.returncode:
                errors.seek(0)
                sys.exit(f"{self.name} failed:\n{errors.read()}")
            said.seek(0)
            found = json.loads(said.read().splitlines()[-1])
        if not found["kind"].startswith(self.kind):
            sys.exit(f"{self.name}: the layers are of {found['kind']}")
        self.seconds.append(found["seconds"])
        self.cpu.append(found["cpu"])
        self.peaks.append(peak)
        self.resident.append(resident)
        self.device_peaks.append(found["device_peak"])
        self.nbytes = found["bytes"]


def _memory(pid: int) -> tuple[int, int]:
    """RssAnon and VmHWM in bytes; zeros of a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    found = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest
    }
    return found.get("RssAnon", 0), found.get("VmHWM", 0)


def warm(folder: Path) -> None:
    """Read every file once: what is compared is the loading, not the disk."""
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


@dataclass(frozen=True)
class Verdict:
    """A bound, and how a figure stands to it."""

    what: str
    value: float
    bound: float
    unit: str
    binding: bool

    @property
    def met(self) -> bool:
        return self.value <= self.bound

    def __str__(self) -> str:
        how = "met" if self.met else "BROKEN" if self.binding else "MISSED"
        return f"{self.what}: {self.value:,.2f} {self.unit}, bound {self.bound:,.2f}: {how}"


def verdicts(cases: dict[str, Case], largest: int, device: str) -> list[Verdict]:
    """The bounds: memory's are binding."""
    found = []
    empty = cases[EMPTY]
    for name in (FLY, FOLDER):
        case = cases[name]
        if device == "cpu":
            over = median(case.peaks) - median(empty.peaks)
            bound = case.nbytes + TENSORS * largest + SLACK
            found.append(Verdict(f"peak of {name}, over an empty process", over / 1e6, bound / 1e6, "MB", True))
        else:
            peak, bound = median(case.device_peaks), case.nbytes + TENSORS * largest + SLACK
            found.append(Verdict(f"peak of {name}, on the device", peak / 1e6, bound / 1e6, "MB", True))
            over, bound = median(case.peaks) - median(empty.peaks), TENSORS * largest + SLACK
            found.append(Verdict(f"peak of {name}, on the host", over / 1e6, bound / 1e6, "MB", True))
    ratio = median(cases[FLY].seconds) / median(cases[SIXTEEN].seconds)
    found.append(Verdict("on the fly, over a 16-bit load", ratio, ON_THE_FLY, "times", False))
    if BNB_FOLDER in cases:
        ratio = median(cases[FOLDER].seconds) / median(cases[BNB_FOLDER].seconds)
        found.append(Verdict("4-bit folder, over bitsandbytes", ratio, 1.0, "times", False))
    return found


def show(cases: dict[str, Case], largest: int, judged: list[Verdict], on_gpu: bool) -> None:
    """The table."""
    empty = median(cases[EMPTY].peaks)
    print(f"largest tensor {largest / 1e6:,.1f} MB; memory in MB, medians of {len(cases[EMPTY].peaks)} processes")
    columns = {"seconds": 9, "from": 8, "to": 8, "CPU": 8, "model": 10, "RssAnon": 10, "over empty": 12, "VmHWM": 9}
    print(" " * 30 + "".join(f"{name:>{width}}" for name, width in columns.items()), end="")
    print(f"{'on device':>11}" if on_gpu else "")
    for case in cases.values():
        seconds, times = case.seconds, ""
        if case.name != EMPTY:
            times = f"{median(seconds):9.2f}{min(seconds):8.2f}{max(seconds):8.2f}{median(case.cpu):8.2f}"
        peak = median(case.peaks)
        row = f"{case.name:30}{times:33}{case.nbytes / 1e6:>10,.1f}{peak / 1e6:>10,.1f}{(peak - empty) / 1e6:>12,.1f}"
        row += f"{median(case.resident) / 1e6:>9,.0f}"
        print(row + (f"{median(case.device_peaks) / 1e6:>11,.1f}" if on_gpu else ""))
    for verdict in judged:
        print(verdict)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m peers.loading", description=__doc__.splitlines()[0])
    parser.add_argument("--size-gb", type=float, default=1.0, help="of the 16-bit folder")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind")
    parser.add_argument("--folder", type=Path, help="where to put it; default the system's temporary folder")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured there too")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    """Make, measure, print."""
    options = arguments()
    if options.make:
        return print(make_source(options.make, int(options.size_gb * 1e9)))
    if options.child:
        return print(json.dumps(load(*options.child, options.device)))
    from harness import bnb, machine

    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        plain, packed = Path(work, "16bit"), Path(work, "4bit")
        make = [sys.executable, "-m", "peers.loading", "--make", str(plain), "--size-gb", str(options.size_gb)]
        largest = int(subprocess.run(make, check=True, capture_output=True, text=True).stdout)
        quantize = [sys.executable, "-m", "fourbit.cli", "quantize", str(plain), str(packed), "--blocksize", "64"]
        subprocess.run(quantize, check=True, stdout=subprocess.DEVNULL)
        made = [Case(EMPTY, plain, ""), Case(SIXTEEN, plain, "torch."), Case(FLY, plain, "fourbit.")]
        made += [Case(FOLDER, packed, "fourbit.")]
        if bnb.load() is not None:
            made += [Case(BNB_FLY, plain, "bitsandbytes."), Case(BNB_FOLDER, packed, "bitsandbytes.")]
        cases = {case.name: case for case in made}
        about = machine.about()
        machine.print_about(about)
        warm(plain)
        warm(packed)
        shuffled = random.Random(0)
        for _ in range(options.rounds):
            for case in shuffled.sample(made, len(made)):
                case.run(options.device)
    judged = verdicts(cases, largest, options.device)
    show(cases, largest, judged, options.device != "cpu")
    if options.json:
        rows = {name: {k: v for k, v in vars(case).items() if k != "folder"} for name, case in cases.items()}
        Path(options.json).write_text(json.dumps({**about, "largest": largest, "cases": rows}, indent=1))
    sys.exit(any(v.binding and not v.met for v in judged))


if __name__ == "__main__":
    main()
