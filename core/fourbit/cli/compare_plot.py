"""The picture of `fourbit compare --plot`: a bar of SQNR for each tensor that differs, the worst on top."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fourbit.checkpoint.compare import Comparison

MOST_BARS = 60
"""More would not be readable; the worst are drawn."""


def require_matplotlib() -> None:
    """Raise ImportError, naming the extra, if matplotlib is not there."""
    if find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'fourbit[plot]'")


def draw(found: Comparison, path: Path) -> None:
    """Write the picture; the file's suffix says the format (.png, .svg, .pdf).

    Raises ValueError if no tensor has an SQNR, or if the format is unknown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no global state, no window

    rows = [(t.name, t.type_b, t.sqnr_db) for t in found.tensors if t.sqnr_db is not None]
    if not rows:
        raise ValueError("nothing to plot: no tensor differs")
    shown = rows[:MOST_BARS]
    figure = Figure(figsize=(10, 1.4 + 0.22 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    kinds = list(dict.fromkeys(kind for _, kind, _ in shown))
    for i, kind in enumerate(kinds):
        at = [y for y, row in enumerate(shown) if row[1] == kind]
        axes.barh(at, [shown[y][2] for y in at], height=0.75, color=f"C{i}", label=kind)
    for y, (_, _, ratio) in enumerate(shown):
        end = max(ratio, 0.0)
        axes.annotate(f"{ratio:.1f}", (end, y), (3, 0), textcoords="offset points", va="center", fontsize=7)
    # names are a stranger's: no mathematics between dollar signs, and not without end
    names = [(name if len(name) <= 70 else "…" + name[-69:]).replace("$", r"\$") for name, _, _ in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.set_xlabel("SQNR in dB: higher is closer to A")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    if len(kinds) > 1:
        axes.legend(title="type in B", loc="lower right")
    left_out = f" (the worst {len(shown)} of {len(rows)})" if len(shown) < len(rows) else ""
    title = f"{found.b.name} against {found.a.name}{left_out}".replace("$", r"\$")
    axes.set_title(title, fontsize=10, loc="left")
    figure.savefig(path, dpi=150)
