"""How `python -m peers cpu` prints: a line for each row with its verdicts beneath, and what was missed."""

from __future__ import annotations

from harness.timing import ReadBandwidth, milliseconds
from peers import targets
from peers.cpu import Row


def print_row(case: str, row: Row, heading: str | None) -> str:
    """One row, after a heading if it is the first of its case and shape; returns the heading."""
    now = f"{case}, {row.label.split(' ')[0]}" if "×" in row.label and case != "module" else case
    if now != heading:
        print(f"\n{now}: median [p10 to p90] ms, ×: a peer's time over fourbit's")
    own = row.times["fourbit"]
    parts = [f"fourbit {milliseconds(own)}"]
    for name, times in row.times.items():
        if name == "fourbit double":
            parts.append(f"double-quantized {milliseconds(times)}")
        elif name not in ("fourbit", "read"):
            parts.append(f"{name} {milliseconds(times)} {row.values[name]:.2f}×")
    if targets.READ in row.values:
        parts.append(_rates(row))
        if not ReadBandwidth.steady(row.times["read"]):
            parts.append(f"UNSTEADY: reads took {milliseconds(row.times['read'])}")
    if row.others is not None and row.others > 0.1:
        parts.append(f"DISTURBED: others used {row.others:.0%} of a core")
    parts += [f"{row.values[key]:.2f} {key}" for key in _PLAIN_VALUES if key in row.values]
    print(f"{row.label:22s} {row.threads} thread{'s' * (row.threads > 1)}: " + " | ".join(parts), flush=True)
    verdicts = [f"{t.measure} {_value(t.measure, v)} ({t.describe()}) {verdict}" for t, v, verdict in row.verdicts()]
    if verdicts and case != "sweep":
        print(f"{'':22s} → " + "; ".join(verdicts))
    return now


_PLAIN_VALUES = (targets.RATE, "GB/s of output", "GB/s of fp32", targets.MICROSECONDS)


def _rates(row: Row) -> str:
    values = row.values
    text = f"{values['GB/s']:.1f} of {values['read GB/s']:.1f} GB/s = {values[targets.READ]:.0%}"
    if "double GB/s" in values:
        text += f"; double-quantized {values['double GB/s']:.1f} = {values['double read bandwidth']:.0%}"
        text += f", torch {values['double torch bf16']:.2f}×"
        if "double bitsandbytes" in values:
            text += f", bitsandbytes {values['double bitsandbytes']:.2f}×"
    return text


def print_summary(rows: list[Row]) -> None:
    """How many targets were met, and each that was not."""
    found = [(row, *verdict) for row in rows for verdict in row.verdicts()]
    missed = [entry for entry in found if entry[3] == "MISSED"]
    aimed = sum(entry[3] == "aim met" for entry in found)
    print(f"\n{len(found)} targets: {len(found) - len(missed)} met, {aimed} of them with the aim; {len(missed)} missed")
    for row, target, value, _ in missed:
        print(
            f"  MISSED {row.label}, {row.threads} thread{'s' * (row.threads > 1)}: {target.measure}"
            f" {_value(target.measure, value)}, {target.describe()}{_doubt(row)}"
        )
    swept = [row for row in rows if row.case == "sweep"]
    for threads in sorted({row.threads for row in swept}):
        worst = min((row for row in swept if row.threads == threads), key=lambda row: row.values[targets.COMPOSED])
        print(
            f"least ratio to {targets.COMPOSED}, {threads} threads: {worst.values[targets.COMPOSED]:.2f}, {worst.label}"
        )


def _doubt(row: Row) -> str:
    if row.others is not None and row.others > 0.1:
        return f" (others used {row.others:.0%} of a core)"
    return ""


def _value(measure: str, value: float) -> str:
    return f"{value:.0%}" if measure == targets.READ else f"{value:.2f}"
