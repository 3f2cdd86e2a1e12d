"""The table of what runs on several processes, in plugins/fourbit_transformers/README.md: made by running its tests.

    python tests/plugins/distributed_table.py             # runs them, and writes this environment's column
    python tests/plugins/distributed_table.py --timeout 900

A column is of the versions of torch, transformers and the device; those of other environments stay as they are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

TREE = Path(__file__).parents[2]
README = TREE / "plugins/fourbit_transformers/README.md"
HEAD = "| on several processes |"

ROWS = {
    "`parallelize_module`, ColwiseParallel and RowwiseParallel: results, gradients, full and distributed state dicts": (
        "tests/core/nn/test_tensor_parallel.py::test_mlp[2]"
    ),
    "the same, 4 processes, some of them without a part": "tests/core/nn/test_tensor_parallel.py::test_mlp[4]",
    "ops called on DTensors": "tests/core/nn/test_tensor_parallel.py::test_ops_on_dtensors",
    '`from_pretrained(tp_plan="auto")`, dense, saved as one process saves it': (
        "tests/plugins/test_tensor_parallel.py::test_same_as_one_process[llama]"
    ),
    "the same, mixture of experts": "tests/plugins/test_tensor_parallel.py::test_same_as_one_process[qwen3-moe]",
    "FSDP2: training, full, broadcast and distributed state dicts, mixed precision": (
        "tests/plugins/test_distributed.py::test_fsdp2[True-96]"
    ),
    "the same, rows that do not divide": "tests/plugins/test_distributed.py::test_fsdp2[True-129]",
    "Trainer with accelerate's FSDP2: 20 QLoRA steps as one process, saved, resumed, no bit changed": (
        "tests/plugins/test_fsdp_trainer.py::test_twenty_steps"
    ),
    "DDP": "tests/plugins/test_distributed.py::test_ddp",
}
"""What a row says, and the test that shows it."""

OUTCOMES = {"failure": "fails", "error": "fails", "skipped": "not run"}


def outcomes(timeout: int) -> dict[str, str]:
    """ "yes", "fails" or "not run" for each row."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "--long", "-q", "-p", "no:cacheprovider", f"--junitxml={file}"]
        subprocess.run([*command, *ROWS.values()], cwd=TREE, timeout=timeout)
        cases = ElementTree.parse(file).getroot().iter("testcase")
        found = {}
        for case in cases:
            name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
            found[name] = next((OUTCOMES[child.tag] for child in case if child.tag in OUTCOMES), "yes")
    return {what: found.get(test, "not run") for what, test in ROWS.items()}


def column() -> str:
    """What this environment's is called."""
    import torch
    import transformers

    return f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"


def read(text: str) -> dict[str, dict[str, str]]:
    """The columns of the table in a text, by name, with each row's outcome."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    start = next((i for i, line in enumerate(lines) if line.startswith(HEAD)), None)
    if start is None:
        return {}
    _, *names = cells(lines[start])
    rows = {cells(line)[0]: cells(line)[1:] for line in lines[start + 2 :]}
    return {name: {what: values[i] for what, values in rows.items() if what in ROWS} for i, name in enumerate(names)}


def cells(line: str) -> list[str]:
    """Of a line of a table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table(columns: dict[str, dict[str, str]]) -> str:
    """In Markdown."""
    lines = [f"{HEAD} {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {what} | {' | '.join(c.get(what, 'not run') for c in columns.values())} |" for what in ROWS]
    return "\n".join(lines) + "\n"


def written(text: str, columns: dict[str, dict[str, str]]) -> str:
    """The text with the table of `columns` in the place of its own."""
    begin = text.index(HEAD)
    end = text.find("\n\n", begin)
    return text[:begin] + table(columns).rstrip("\n") + (text[end:] if end >= 0 else "\n")


def main() -> None:
    """Run, and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--timeout", type=int, default=1800)
    options = parser.parse_args()
    found = outcomes(options.timeout)
    text = README.read_text(encoding="utf-8")
    README.write_text(written(text, {**read(text), column(): found}), encoding="utf-8")
    print(table({column(): found}))


if __name__ == "__main__":
    main()
