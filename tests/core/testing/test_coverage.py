"""No op, Backend method or attribute without a conformance case, no hook without a test; none without documentation."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

import fourbit.testing
from fourbit import hookspecs, ops
from fourbit.backend import COMPOSITIONS, OPS, Backend, OpQuery, Support
from fourbit.operations import OPERATIONS

MODULES = sorted(path.stem for path in Path(fourbit.testing.__file__).parent.glob("test_*.py"))


@pytest.mark.parametrize("op", OPS)
def test_op_has_a_conformance_case(op):
    """In a module of its own kind, beside those that take every op."""
    modules = [importlib.import_module(f"fourbit.testing.{name}") for name in MODULES]
    covering = [module.__name__ for module in modules if op in module.COVERS and set(module.COVERS) != set(OPS)]
    assert covering, f"no module of fourbit.testing names {op} in COVERS"
    assert any(f"{op}" in Path(importlib.import_module(name).__file__).read_text() for name in covering)


@pytest.mark.parametrize("op", OPS)
def test_op_is_whole(op):
    """A schema, an eager kernel, a fake, a Backend method, and a word on what runs where it is not overridden."""
    assert OPERATIONS[op].schema.startswith(f"{op}(") and op in ops.eager and callable(OPERATIONS[op].fake)
    assert callable(getattr(Backend, op))
    assert (op in COMPOSITIONS) == (op not in ("quantize_4bit", "dequantize_4bit"))


def test_covers_names_only_ops():
    for name in MODULES:
        assert set(importlib.import_module(f"fourbit.testing.{name}").COVERS) <= set(OPS), name


def test_what_a_backend_says_of_itself_has_a_conformance_case():
    """Every method and attribute that is no op is read from the backend under test by some module of the suite."""
    suite = "".join(Path(importlib.import_module(f"fourbit.testing.{name}").__file__).read_text() for name in MODULES)
    own = {name for name, _ in public_functions(Backend)} | set(Backend.__annotations__)
    assert own >= {"supports", "unavailable", "describe", "default_blocksize", "priority", "name"}
    for name in own - set(OPS):
        assert f"backend.{name}" in suite, f"no conformance case for Backend.{name}"


def test_every_hook_has_a_plugin_that_works_and_one_that_fails():
    from tests.core import test_registry_plugins as plugins
    from tests.core.plans import test_plan_known as models

    broken = "".join(source for source, _, _ in plugins.BROKEN.values()) + models.PANICS
    whole = inspect.getsource(plugins)
    working = whole.split("BROKEN = {")[0] + whole.split("def all_broken")[1] + models.WORKS
    for name, _ in public_functions(hookspecs):
        if name.startswith("fourbit_"):
            assert f"def {name}(" in broken, f"no broken plugin has the hook {name}"
            assert f"def {name}(" in working, f"no working plugin has the hook {name}"


def public_functions(owner: object) -> list[tuple[str, object]]:
    members = inspect.getmembers(owner, lambda member: inspect.isfunction(member) or isinstance(member, property))
    return [(name, member) for name, member in members if not name.startswith("_")]


@pytest.mark.parametrize("owner", (Backend, OpQuery, Support), ids=lambda owner: owner.__name__)
def test_contract_is_documented(owner):
    assert owner.__doc__
    for name, function in public_functions(owner):
        assert function.__doc__ and len(function.__doc__.split()) >= 5, f"{owner.__name__}.{name} has no docstring"


def test_backend_attributes_are_documented():
    """Each class attribute is followed by a string that says what it is."""
    source = inspect.getsource(Backend)
    for name in Backend.__annotations__:
        after = source.split(f"    {name}: ", 1)[1].split("\n", 1)[1]
        assert after.lstrip().startswith('"""'), f"Backend.{name} has no docstring"


def test_hooks_are_documented():
    hooks = [function for name, function in public_functions(hookspecs) if name.startswith("fourbit_")]
    assert len(hooks) >= 2
    for hook in hooks:
        assert hook.__doc__ and len(hook.__doc__.split()) >= 5, f"hook {hook.__name__} has no docstring"


def test_suite_files_are_short():
    for path in Path(fourbit.testing.__file__).parent.glob("*.py"):
        assert len(path.read_text().splitlines()) < 300, path.name
