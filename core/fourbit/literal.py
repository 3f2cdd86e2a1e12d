"""How strings of files are shown: as they are, but for what a terminal would act on or not show."""

from __future__ import annotations


def literal(text: str) -> str:
    """Text as it is, but for characters that a terminal does not show: those are written as escapes.

    These are control characters (line breaks, too), marks that turn the direction of writing, and whatever else
    Unicode does not count as printable.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
