"""The table of the zoo in plugins/fourbit_transformers/README.md: `python tests/plugins/zoo/table.py` writes it."""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[3]
README = ROOT / "plugins" / "fourbit_transformers" / "README.md"
COMMAND = "python tests/plugins/zoo/table.py"
BEGIN, END = f"<!-- zoo: written by {COMMAND} -->", "<!-- zoo: end -->"
HEADER = (
    "| class | family | 4-bit layers | on the fly = folder = memory | saved and reloaded | bitsandbytes reads it |",
    "| --- | --- | ---: | --- | --- | --- |",
)


def versions() -> str:
    """What is installed, as the table names it."""
    from importlib.metadata import version

    from tests.support import installed

    theirs = version("bitsandbytes") if installed("bitsandbytes") else "none"
    return f"Made with transformers {version('transformers')} and bitsandbytes {theirs}, on the CPU."


def _lines() -> list[str]:
    text = README.read_text() if README.exists() else ""
    return text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()


def made_with() -> str:
    """The table's line on versions."""
    return next((line for line in _lines() if line.startswith("Made with")), "")


def rows() -> dict[str, str]:
    """The table's rows, by the entry's name."""
    found = [line for line in _lines() if line.startswith("| ") and line not in HEADER]
    return {line.split("|")[1].strip(): line for line in found}


def write(made: list[str]) -> None:
    """Put a new table in the place of the one between the marks, or at the end."""
    text = README.read_text() if README.exists() else f"# fourbit_transformers\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    table = "\n".join((BEGIN, versions(), "", *HEADER, *made, END))
    README.write_text(f"{before}{table}{after}")


def main() -> int:
    """Examine every entry, one after the other; nothing is written where one fails."""
    sys.path.append(str(ROOT))
    import transformers

    from tests.plugins.zoo.checks import examine
    from tests.plugins.zoo.models import ZOO

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    made, failed = [], 0
    for name, entry in ZOO.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                made.append(str(examine(entry, Path(folder))))
                print(made[-1])
            except Exception as error:
                failed += 1
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    if not failed:
        write(made)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
