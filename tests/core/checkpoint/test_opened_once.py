"""Headers are read once: the open Checkpoint is passed on. What is read again is the new folder, to check it."""

from __future__ import annotations

from collections import Counter

import pytest
from typer.testing import CliRunner

import fourbit
from fourbit.checkpoint import Checkpoint, reader
from fourbit.checkpoint.dequantize import dequantize_checkpoint
from fourbit.checkpoint.inspect import inspect_checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.cli.app import app
from tests.folders import write_folder

SHARDS = 2


@pytest.fixture
def opened(monkeypatch):
    """How many times the header of each file has been read, by folder and file name."""
    counts: Counter[str] = Counter()
    read = reader.read_header

    def counted(file):
        counts[f"{file.parent.name}/{file.name}"] += 1
        return read(file)

    monkeypatch.setattr(reader, "read_header", counted)
    return counts


def times(counts, folder):
    """The numbers of times that files of `folder` were read: one number if all alike."""
    return {count for name, count in counts.items() if name.startswith(folder)}


@pytest.fixture
def src(tmp_path):
    return write_folder(tmp_path / "src", shards=SHARDS)


def test_planning_reads_each_header_once_and_none_of_an_open_checkpoint(src, opened):
    by_path = fourbit.plan(src)
    assert times(opened, "src") == {1} and len(opened) == SHARDS
    with Checkpoint(src) as checkpoint:
        opened.clear()
        assert fourbit.plan(checkpoint) == by_path and not opened


def test_inspecting_reads_each_header_once(src, opened):
    inspect_checkpoint(src)
    assert times(opened, "src") == {1}


def test_quantizing_reads_the_source_once_and_what_it_wrote_once(src, tmp_path, opened):
    quantize_checkpoint(src, tmp_path / "dst")
    assert times(opened, "src") == {1} and times(opened, "data") == {1}
    opened.clear()
    dequantize_checkpoint(tmp_path / "dst", tmp_path / "back")
    assert times(opened, "dst") == {1} and times(opened, "data") == {1}


@pytest.mark.parametrize(
    "command", (("quantize", "{src}", "{dst}"), ("quantize", "{src}", "{dst}", "--dry-run"), ("estimate", "{src}"))
)
def test_the_commands_read_the_source_once(src, tmp_path, opened, command):
    result = CliRunner().invoke(app, [word.format(src=src, dst=tmp_path / "dst") for word in command])
    assert result.exit_code == 0, result.output
    assert times(opened, "src") == {1}
