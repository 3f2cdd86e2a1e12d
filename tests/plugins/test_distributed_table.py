"""The table of what runs on several processes: in the README, of these tests, and nothing in it fails."""

import re

import pytest

from tests.plugins import distributed_table as made


def test_readme_has_the_table():
    text = made.README.read_text(encoding="utf-8")
    columns = made.read(text)
    assert columns and made.table(columns) in text
    for name, found in columns.items():
        assert re.fullmatch(r"torch \d+\.\d+\.\d+, transformers \d+\.\d+\.\d+", name)
        assert found.keys() == made.ROWS.keys()
        assert set(found.values()) <= {"yes", "not run"}


@pytest.mark.parametrize("test", made.ROWS.values())
def test_rows_name_tests(test):
    file, name = test.split("::")
    assert f"\ndef {name.partition('[')[0]}(" in (made.TREE / file).read_text(encoding="utf-8")


def test_another_environment_keeps_the_columns():
    text = made.README.read_text(encoding="utf-8")
    columns = made.read(text)
    again = made.written(text, {**columns, "torch 9.9.9, transformers 9.9.9": dict.fromkeys(made.ROWS, "fails")})
    assert made.read(again)["torch 9.9.9, transformers 9.9.9"].keys() == made.ROWS.keys()
    assert {name: made.read(again)[name] for name in columns} == columns
    assert made.written(again, columns) == text
