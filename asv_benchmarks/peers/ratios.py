"""What contests of one GPU have in common: measured cells, ratios to torch's 16-bit product, Markdown tables."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness.graphs import Call, Contender, cycled, measure

TORCH, AGAIN = "torch", "torch, again"
"""The same calls at the beginning and at the end of each round: a card gets hotter, and slower, meanwhile."""

FOURBIT, BNB, DOUBLE = "fourbit", "bitsandbytes", ", double"

WORSE = 2.0
"""How many times torch's own error a result may have."""


@dataclass(frozen=True)
class Cell:
    """One contender at one place of the table.

    Attributes:
        line: what is measured, such as "8192x8192"; a line of the table for each contender.
        column: the number of rows or tokens.
        who: the contender.
        microseconds: median of a call.
        ratio: torch's microseconds over these.
        note: how it was timed, if not by graph replay.
    """

    line: str
    column: int
    who: str
    microseconds: float
    ratio: float
    note: str = ""


def contest(line: str, column: int, calls: dict[str, Sequence[Call]], rounds: int) -> list[Cell]:
    """Time the calls of contenders, of which "torch" is the first, in turn; each has as many in a replay."""
    most = max(map(len, calls.values()))
    contenders = {who: Contender(cycled(own, most), 0.0) for who, own in calls.items()}
    contenders[AGAIN] = Contender(cycled(calls[TORCH], most), 0.0)
    found = {who: (us, note) for who, (us, _, note) in measure(contenders, rounds).items()}
    return cells(line, column, found)


def cells(line: str, column: int, found: dict[str, tuple[float, str]]) -> list[Cell]:
    """`{who: (microseconds, note)}` with the ratios; torch's time is the mean of its two."""
    base = (found[TORCH][0] + found[AGAIN][0]) / 2
    return [Cell(line, column, who, us, base / us, note) for who, (us, note) in found.items()]


def drift(found: Iterable[Cell]) -> float:
    """The largest difference between torch's two times, as a fraction: ratios are to their mean."""
    times: dict[tuple[str, int], dict[str, float]] = {}
    for cell in found:
        times.setdefault((cell.line, cell.column), {})[cell.who] = cell.microseconds
    return max(abs(each[AGAIN] / each[TORCH] - 1) for each in times.values())


def heading(title: str, columns: Sequence[int]) -> str:
    """Markdown: the first two lines of a table."""
    return f"| {title} | | " + " | ".join(map(str, columns)) + " |\n" + "|---" * (len(columns) + 2) + "|"


def body(found: Iterable[Cell], columns: Sequence[int], ratios: bool) -> str:
    """Markdown: a line for each line and contender; ratios to torch, or microseconds, torch's of its first turn."""
    text: dict[tuple[str, str], dict[int, str]] = {}
    for cell in found:
        if cell.who != AGAIN and not (ratios and cell.who == TORCH):
            value = f"{cell.ratio:.2f}" if ratios else _microseconds(cell.microseconds)
            text.setdefault((cell.line, cell.who), {})[cell.column] = value
    return "\n".join(
        f"| {line} | {who} | " + " | ".join(own.get(column, "–") for column in columns) + " |"
        for (line, who), own in text.items()
    )


def _microseconds(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def notes(found: Iterable[Cell]) -> str:
    """Which cells were not timed by graph replay, and why; empty if all were."""
    where: dict[tuple[str, str, str], list[int]] = {}
    for cell in found:
        if cell.note:
            where.setdefault((cell.line, cell.who, cell.note), []).append(cell.column)
    return "\n".join(f"{line} {who} at {columns}: {note}" for (line, who, note), columns in where.items())


def relative_error(found: Tensor, true: Tensor) -> float:
    """Root of the mean square of the difference, over that of `true`; by parts, so that little memory is needed."""
    difference = size = 0.0
    for mine, right in zip(found.split(1024), true.split(1024), strict=True):
        difference += float((mine.float() - right.float()).square().sum(dtype=torch.float64))
        size += float(right.float().square().sum(dtype=torch.float64))
    return (difference / size) ** 0.5


def print_times(found: Sequence[Cell], title: str, columns: Sequence[int]) -> None:
    """The microseconds, and what there is to say of them."""
    print(f"\nMicroseconds:\n{heading(title, columns)}\n{body(found, columns, ratios=False)}\n")
    print(f"torch's two times differ by {drift(found):.1%} at most")
    if any(cell.note for cell in found):
        print(notes(found))


def grouped(said: Iterable[tuple[str, str]]) -> str:
    """`(of what, text)`, each text once, after all that it was said of."""
    by_text: dict[str, list[str]] = {}
    for what, text in said:
        by_text.setdefault(text, []).append(what)
    return "\n".join(f"{'; '.join(whats)}:\n  {text}" for text, whats in by_text.items())


@dataclass(frozen=True)
class Check:
    """A result beside float32: its relative error, torch's own on the same weights in 16 bit, whether it repeats."""

    what: str
    error: float
    torch_error: float
    repeats: bool

    @property
    def good(self) -> bool:
        """Not much worse than torch, which NaN is."""
        return self.repeats and self.error <= WORSE * self.torch_error

    def __str__(self) -> str:
        verdict = "" if self.good else "  WRONG" if self.repeats else "  DIFFERS from call to call"
        over = self.error / self.torch_error
        return f"{self.what}: {self.error:.3g}, torch {self.torch_error:.3g}, {over:.2f} times{verdict}"


def print_checks(checks: Sequence[Check], every: bool = False) -> bool:
    """The worst, and all that are wrong (or simply every one); whether all are good."""
    bad = [check for check in checks if not check.good]
    for check in checks if every else bad:
        print(check)
    if checks:
        print(f"{len(checks)} results, {len(bad)} of them wrong; the worst relative error beside float32 is of")
        print(f"  {max(checks, key=lambda c: (not c.good, c.error / c.torch_error))}", flush=True)
    return not bad


class Budget:
    """Seconds that a run may take."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.left_out: list[str] = []

    def allows(self, what: str) -> bool:
        """Whether there is time for `what`; notes it if not."""
        if time.monotonic() < self.end:
            return True
        self.left_out.append(what)
        return False

    def print(self) -> None:
        """What was left out."""
        if self.left_out:
            print(f"NO TIME for {', '.join(self.left_out)}: raise --seconds", flush=True)


def conclude(
    found: Sequence[Cell],
    title: str,
    columns: Sequence[int],
    missed: Sequence[str],
    said: str,
    checks: Sequence[Check],
    budget: Budget,
) -> None:
    """Print what follows the table of ratios; SystemExit where a result is wrong.

    Args:
        found: all cells.
        title: of the tables' lines.
        columns: numbers of rows or tokens.
        missed: what is below its target.
        said: the ways that fourbit took.
        checks: of results.
        budget: of the run.
    """
    if found:
        print_times(found, title, columns)
        print("\n".join(["below the target:", *missed]) if missed else "no target missed")
    print(said, flush=True)
    good = print_checks(checks)
    budget.print()
    if not good:
        raise SystemExit(1)


def add_options(
    parser: argparse.ArgumentParser, rounds: int, seconds: float, *, grad: str, double: str, weights: str, dtype: str
) -> None:
    """The options that the contests share, with their defaults; `weights`: what they go through, `dtype`: its help."""
    parser.add_argument("--rounds", type=int, default=rounds, help="timed replays of each contender")
    parser.add_argument(
        "--grad", nargs="?", choices=("no", "too", "only"), const="too", default=grad, help="the gradient for x"
    )
    parser.add_argument(
        "--double", nargs="?", choices=("no", "too", "only"), const="too", default=double, help="double-quantized"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help=dtype)
    parser.add_argument("--check", action="store_true", help="errors beside float32 instead of times")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"no more {weights} are begun after that")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")


def passes(chosen: str) -> tuple[bool, ...]:
    """Of --grad or --double, the values to go through."""
    return {"no": (False,), "too": (False, True), "only": (True,)}[chosen]
