"""The one table that `fourbit demo` prints."""

from __future__ import annotations

from typing import Any

from fourbit.cli import console
from fourbit_demo import sample_text

ABOUT_PERPLEXITY = (
    "Perplexity: on {tokens} tokens of Python's help topics (sha256 {digest}…), lower is better. These GGUF"
    " weights already lie on a 4-bit grid of blocks of 32, which a second grid suits badly: the figure shows that"
    " all of it works, and is no measure of the data type's quality."
)


def show(result: dict[str, Any]) -> None:
    """Sizes, perplexity, text, backends and seconds, before and after."""
    before, after, config, seconds = result["before"], result["after"], result["config"], result["seconds"]
    kind = f"{config['quant_type']}, blocksize {config['blocksize']}"
    kind += ", double-quantized" if config["double_quant"] else ""
    about = ABOUT_PERPLEXITY.format(tokens=after["tokens"], digest=after["text_sha256"][:12])
    title = f"{result['model']['name']}: {result['model']['parameters']:,} parameters, of which"
    title += f" {result['quantized_parameters']:,} are quantized"
    table = console.table(title, "", "16 bit", f"4 bit ({kind})", left=1, wrap=3, caption=about)
    ratio = before["bytes"] / after["bytes"]
    table.add_row("bytes", f"{before['bytes']:,}", f"{after['bytes']:,} ({ratio:.2f} times smaller)")
    for key, label in (
        ("bits_per_quantized_parameter", "bits per quantized parameter"),
        ("bits_per_parameter", "bits per parameter, whole model"),
    ):
        table.add_row(label, f"{before[key]:.6f}", f"{after[key]:.6f}")
    change = after["perplexity"] / before["perplexity"] - 1
    table.add_row("perplexity", f"{before['perplexity']:.3f}", f"{after['perplexity']:.3f} ({change:+.1%})")
    table.add_section()
    label = f"“{sample_text.PROMPT}”"
    table.add_row(label, *(console.lines(*side["text"].splitlines()) for side in (before, after)))
    table.add_section()
    for op in result["ops"]:
        how = ", composed of other ops" if op["composed_of_other_ops"] else ""
        table.add_row(f"{op['op']} ran on", "", f"{op['backend']} ({op['device']}, {op['dtype']}{how})")
    table.add_section()
    table.add_row("seconds to load", f"{before['seconds']['load']:.1f}", f"{after['seconds']['load']:.1f}")
    for key in ("generate", "perplexity"):
        label = {"generate": "seconds for the answer", "perplexity": "seconds for the perplexity"}[key]
        table.add_row(label, f"{before['seconds'][key]:.1f}", f"{after['seconds'][key]:.1f}")
    fetched = f"{seconds['weights']:.1f} + {seconds['16-bit folder']:.1f}"
    table.add_row("seconds to get and convert, to quantize", fetched, f"{seconds['quantize']:.1f}")
    table.add_row("seconds in all", "", f"{seconds['total']:.1f}", style="bold")
    console.out.print(table)
