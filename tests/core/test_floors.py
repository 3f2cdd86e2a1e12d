"""The floors of the house: every import points down, and no files import each other in a circle.

Plugins and backends stand on core; nothing in core knows either. Within core the floors are listed once, here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]
CORE = "fourbit"

FLOORS = (
    "version float_environment literal",
    "codebooks",
    "scales",
    "numerics",
    "checks",
    "weight",
    "state",
    "config",
    "operations",
    "backend",
    "plans/known",  # what plugins of models return
    "hookspecs",
    "isolation",
    "registry",
    "plugins",
    "dispatch",
    "ops",
    "direct",
    "autograd vmap",
    "functional",
    "reference",
    "plans",
    "nn",
    "explanation",
    "checkpoint",
    "__init__",
    "cli",
    "testing",
)
"""Files and folders of core/fourbit, lower floors first. A folder's word covers the files in it without their own."""

BENEATH = {"core": {"fourbit_pytest"}, "backends": {"fourbit"}, "plugins": {"fourbit"}}
"""Which of our packages a source root's files may import, beside the package that they are in."""

SHARED = {
    "fourbit_cuda": {"fourbit_gpu"},
    "fourbit_rocm": {"fourbit_gpu"},
    "fourbit_models": {"fourbit_transformers", "fourbit_diffusers"},
    "fourbit_demo": {"fourbit_transformers"},
    "fourbit_transformers": {"fourbit_demo"},  # an example trains its model
}
"""And what a package may import besides."""


@dataclass(frozen=True)
class Import:
    """One import: names of modules, the line for a message, and whether it stands under TYPE_CHECKING."""

    importer: str
    imported: str
    where: str
    for_typing: bool

    def __str__(self) -> str:
        return f"{self.where} imports {self.imported}"


def modules(tree: Path) -> dict[str, Path]:
    """Every file below the source roots by its import path; a distribution of its own there is a root itself."""
    roots = [tree / name for name in BENEATH]
    roots += [path.parent for root in roots for path in root.glob("*/pyproject.toml")]
    found = {}
    for path in (path for name in BENEATH for path in (tree / name).rglob("*.py*") if path.suffix in (".py", ".pyi")):
        root = max((root for root in roots if root in path.parents), key=lambda root: len(root.parts))
        if "build" not in path.parts:
            found[".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def imports_of(name: str, path: Path, tree: Path, known: dict[str, Path]) -> Iterator[Import]:
    """The file's imports of our own packages: to the module itself where one is named, else to its package."""

    def visit(parent: ast.AST, for_typing: bool) -> Iterator[Import]:
        for node in ast.iter_child_nodes(parent):
            named: list[str] = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: a relative import"
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                named = sorted({each if each in known else str(node.module) for each in inside})
            where = f"{path.relative_to(tree)}:{getattr(node, 'lineno', 0)}"
            for each in named:
                if each.partition(".")[0].startswith("fourbit"):
                    yield Import(name, each, where, for_typing)
            typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            yield from visit(node, for_typing or typing_only)

    yield from visit(ast.parse(path.read_text()), False)


def all_imports(tree: Path) -> list[Import]:
    known = modules(tree)
    return [each for name, path in known.items() for each in imports_of(name, path, tree, known)]


def crossing(tree: Path, imports: list[Import]) -> list[str]:
    """Imports of a package that stands beside or above."""

    def allowed(each: Import) -> bool:
        package = each.importer.partition(".")[0]
        beneath = BENEATH[each.where.partition("/")[0]] | SHARED.get(package, set()) | {package}
        return each.imported.partition(".")[0] in beneath

    return [str(each) for each in imports if not allowed(each)]


def floor_of(module: str, floors: tuple[str, ...]) -> int:
    """The floor of a module of core. Raises LookupError, saying where to add it, if there is none."""
    by_word = {word: floor for floor, words in enumerate(floors) for word in words.split()}
    path = module.removeprefix("fourbit").removeprefix(".").replace(".", "/")
    for word in (f"{path}/__init__".removeprefix("/"), path, path.partition("/")[0]):
        if word in by_word:
            return by_word[word]
    raise LookupError(f"{module} stands on no floor: add {path!r} to FLOORS in tests/core/test_floors.py, at its place")


def upward(imports: list[Import], floors: tuple[str, ...]) -> list[str]:
    """Imports within core that point up, also those inside functions."""
    within = [each for each in imports if {each.importer.partition(".")[0], each.imported.partition(".")[0]} == {CORE}]
    return [
        str(each)
        for each in within
        if not each.for_typing and floor_of(each.imported, floors) > floor_of(each.importer, floors)
    ]


def circle(imports: list[Import]) -> list[str]:
    """Files that import each other, in order, with the first one again at the end; none if there is no circle."""
    graph: dict[str, set[str]] = {}
    for each in imports:
        goals = graph.setdefault(each.importer, set())
        goals.add(each.imported)
        package = each.imported.rpartition(".")[0]
        while not each.for_typing and package not in ("", CORE) and not f"{each.importer}.".startswith(f"{package}."):
            goals.add(package)  # Python runs its __init__ first
            package = package.rpartition(".")[0]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    found = all_imports(TREE)
    assert len(found) > 300
    return found


def test_packages_import_what_is_beneath_them(imports):
    assert crossing(TREE, imports) == []


def test_every_file_of_core_has_a_floor():
    for name in modules(TREE):
        if name.partition(".")[0] == CORE:
            floor_of(name, FLOORS)


def test_imports_within_core_point_down(imports):
    assert upward(imports, FLOORS) == []


def test_no_files_import_each_other_in_a_circle(imports):
    assert circle(imports) == []


# ---- that all this can fail ---------------------------------------------------------------------------------


@pytest.fixture
def house(tmp_path):
    """`house(path=source)` builds a tree and reads its imports."""

    def build(sources: dict[str, str]) -> list[Import]:
        for path, source in sources.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(source)
        return all_imports(tmp_path)

    return build


def test_an_upward_import_is_found(house):
    imports = house(
        {
            "core/fourbit/low.py": "def late():\n    from fourbit import high\n",
            "core/fourbit/high.py": "from __future__ import annotations\nimport torch, fourbit.low\n",
            "core/fourbit/folder/typed.py": "if TYPE_CHECKING:\n    from fourbit.high import Name\n",
        }
    )
    assert upward(imports, ("low folder", "high")) == ["core/fourbit/low.py:2 imports fourbit.high"]
    assert upward(imports, ("high", "low folder")) == ["core/fourbit/high.py:2 imports fourbit.low"]
    with pytest.raises(LookupError, match="fourbit.high stands on no floor: add 'high' to FLOORS"):
        upward(imports, ("low folder",))


def test_an_import_across_is_found(house, tmp_path):
    sources = {
        "core/fourbit/a.py": "def f():\n    import fourbit_transformers.loading\n",
        "core/fourbit_pytest/__init__.py": "",
        "core/fourbit/b.py": "import fourbit_pytest\n",
        "backends/fourbit_cpu/__init__.py": "from fourbit_gpu import plan\nfrom fourbit_cpu import native\n",
        "backends/fourbit_cuda/__init__.py": "from fourbit_gpu import plan\nfrom fourbit.a import f\n",
        "plugins/fourbit_peft/__init__.py": "if TYPE_CHECKING:\n    import fourbit_transformers\n",
        "plugins/other/fourbit_other.py": "import fourbit, fourbit_other, fourbit_cuda\n",
        "plugins/other/pyproject.toml": "",
    }
    assert crossing(tmp_path, house(sources)) == [
        "core/fourbit/a.py:2 imports fourbit_transformers.loading",
        "backends/fourbit_cpu/__init__.py:1 imports fourbit_gpu",
        "plugins/fourbit_peft/__init__.py:2 imports fourbit_transformers",
        "plugins/other/fourbit_other.py:1 imports fourbit_cuda",
    ]


@pytest.mark.parametrize(
    ("back", "found"),
    (
        ("from fourbit import a", ["a", "p.b", "c", "a"]),
        ("def late():\n    from fourbit.a import x", ["a", "p.b", "c", "a"]),
        ("if TYPE_CHECKING:\n    from fourbit.a import x", ["a", "p.b", "c", "a"]),
        ("import fourbit.p.other", ["c", "p", "p.b", "c"]),  # whose package imports b
        ("if TYPE_CHECKING:\n    import fourbit.p.other", []),
        ("import fourbit", []),
    ),
)
def test_a_circle_is_found(house, back, found):
    sources = {"a": "import fourbit.p.b", "p/__init__": "from fourbit.p import b", "p/b": "from fourbit import c"}
    imports = house({f"core/fourbit/{name}.py": text for name, text in {**sources, "p/other": "", "c": back}.items()})
    names = [f"fourbit.{name}" for name in found]
    assert set(circle(imports)) == set(names) and len(circle(imports)) == len(names)
