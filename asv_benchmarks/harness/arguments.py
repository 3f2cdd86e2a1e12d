"""Lists on a command line, separated by commas."""

from __future__ import annotations


def words(text: str) -> tuple[str, ...]:
    """Such as "linear,quantize"."""
    return tuple(part for part in text.split(",") if part)


def numbers(text: str) -> tuple[int, ...]:
    """Such as "1,16"."""
    return tuple(int(part) for part in words(text))


def shapes(text: str) -> tuple[tuple[int, int], ...]:
    """Such as "4096x4096,11008x4096": out x in."""
    return tuple((int(n), int(k)) for n, k in (part.split("x") for part in words(text)))
