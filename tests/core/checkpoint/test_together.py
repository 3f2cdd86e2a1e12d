"""Several processes that do one conversion: the bytes are those of one, however it is divided, interrupted, continued.

Here they are threads, which is faster; tests/core/crash/kill_together.py has processes, and kills them.
"""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest
import torch

import fourbit
from fourbit.checkpoint import CheckpointError, conversion, output, staging, team
from fourbit.checkpoint.dequantize import dequantize_checkpoint
from fourbit.checkpoint.processes import Processes
from fourbit.checkpoint.quantize import QuantizeReport, quantize_checkpoint
from fourbit.checkpoint.verify import verify_checkpoint
from tests.folders import QUANTIZED, contents, sample_tensors, write_folder, write_pipeline

SHARD_BYTES = 9000


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Signs of life, and patience, for processes of a test; each tensor is noted, and little read ahead."""
    for name, seconds in (("BEAT", 0.02), ("POLL", 0.005), ("SILENT", 60.0), ("JOIN", 60.0), ("LEAVE", 3.0)):
        monkeypatch.setattr(team, f"{name}_SECONDS", seconds)
    monkeypatch.setattr(output, "SYNC_SECONDS", 0)
    monkeypatch.setattr(conversion, "SMALL_BUDGET", 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a busy machine's disk takes seconds for each


def even(folder, shards=1):
    """A folder that any number of processes can divide."""
    g = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{i}.q_proj.weight": torch.randn(40, 64, generator=g).bfloat16() for i in range(18)}
    return write_folder(folder, {**tensors, "model.norm.weight": torch.ones(64)}, shards)


def together(src, dst, count, convert=quantize_checkpoint, only=None, of_rank=lambda rank: {}, **options):
    """What each process returns or raises: `of_rank` are options of one; `only` those that are there."""
    found: list[object] = [None] * count

    def run(rank: int) -> None:
        try:
            found[rank] = convert(src, dst, processes=Processes(rank, count), **{**options, **of_rank(rank)})
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (range(count) if only is None else only)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
        assert not thread.is_alive(), "it hangs"
    return found


def succeeded(results):
    assert all(isinstance(result, QuantizeReport) for result in results), results
    return results


def stop(rank, after=1, error=KeyboardInterrupt):
    """`of_rank` for a process that is stopped after so many of its tensors."""
    left = [after]

    def progress(name, done, total):
        left[0] -= 1
        if left[0] <= 0:
            raise error

    return lambda each: {"progress": progress} if each == rank else {}


@pytest.mark.parametrize("files", (1, 3))
@pytest.mark.parametrize("count", (2, 3, 20))
@pytest.mark.parametrize("size", (1, SHARD_BYTES, None))
def test_the_bytes_are_those_of_one_process(tmp_path, files, count, size):
    src = write_folder(tmp_path / "src", shards=files)
    config = fourbit.QuantConfig(double_quant=files == 1)
    want = quantize_checkpoint(src, tmp_path / "want", config, max_shard_size=size)
    reports = succeeded(together(src, tmp_path / "dst", count, config=config, max_shard_size=size))
    assert contents(tmp_path / "dst") == contents(tmp_path / "want") and verify_checkpoint(tmp_path / "dst").ok
    assert reports[0].files == want.files and reports[0].bytes_after == want.bytes_after
    assert sorted(os.listdir(tmp_path)) == ["dst", "src", "want"]


@pytest.mark.parametrize("source", ("src/model.safetensors", "src"))
def test_one_file_as_source(tmp_path, source):
    write_folder(tmp_path / "src")
    quantize_checkpoint(tmp_path / source, tmp_path / "want")
    succeeded(together(tmp_path / source, tmp_path / "dst", 3))
    assert contents(tmp_path / "dst") == contents(tmp_path / "want")


def test_a_pipeline(tmp_path):
    src = write_pipeline(tmp_path / "src")
    quantize_checkpoint(src, tmp_path / "want", components=["transformer"])
    succeeded(together(src, tmp_path / "dst", 3, components=["transformer"]))
    assert contents(tmp_path / "dst") == contents(tmp_path / "want") and verify_checkpoint(tmp_path / "dst").ok


def test_dequantize(tmp_path):
    quantize_checkpoint(write_folder(tmp_path / "src"), tmp_path / "packed")
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "want", max_shard_size=SHARD_BYTES)
    together(tmp_path / "packed", tmp_path / "dst", 2, dequantize_checkpoint, max_shard_size=SHARD_BYTES)
    assert contents(tmp_path / "dst") == contents(tmp_path / "want")


@pytest.mark.parametrize("rank", (0, 1, 2))
def test_overwriting(tmp_path, rank):
    src = even(tmp_path / "src")
    quantize_checkpoint(src, tmp_path / "dst", fourbit.QuantConfig("fp4"))
    before = contents(tmp_path / "dst")
    together(src, tmp_path / "dst", 3, overwrite=True, of_rank=stop(rank))
    assert contents(tmp_path / "dst") == before
    succeeded(together(src, tmp_path / "dst", 2, resume=True))
    quantize_checkpoint(src, tmp_path / "want")
    assert contents(tmp_path / "dst") == contents(tmp_path / "want")
    assert sorted(os.listdir(tmp_path)) == ["dst", "src", "want"]


# ---- resuming


@pytest.mark.parametrize("size", (SHARD_BYTES, None))
@pytest.mark.parametrize("counts", ((2, 3), (3, 2), (3, 1), (1, 2), (2, 1, 3), (1, 3, 1), (2, 2, 2)), ids=str)
@pytest.mark.parametrize("rank", (0, 1))
def test_any_number_continues(tmp_path, counts, rank, size):
    src = even(tmp_path / "src", shards=2)
    quantize_checkpoint(src, tmp_path / "want", max_shard_size=size)
    dst = tmp_path / "dst"

    def run(count, **options):
        if count > 1:
            return together(src, dst, count, max_shard_size=size, resume=True, **options)
        try:
            alone = options.pop("of_rank", lambda rank: {})(0)
            return [quantize_checkpoint(src, dst, max_shard_size=size, resume=True, **alone)]
        except KeyboardInterrupt as error:
            return [error]

    for count in counts[:-1]:
        results = run(count, of_rank=stop(rank if count > 1 else 0, after=2))
        assert isinstance(results[rank if count > 1 else 0], KeyboardInterrupt) and not dst.exists()
    last = succeeded(run(counts[-1]))
    assert contents(dst) == contents(tmp_path / "want") and sorted(os.listdir(tmp_path)) == ["dst", "src", "want"]
    assert last[0].resumed_bytes > 0
    again = succeeded(run(counts[-1]))  # finished: left as it is
    assert again[0].resumed_bytes == again[0].bytes_before and contents(dst) == contents(tmp_path / "want")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def shorten(path):
    os.truncate(path, path.stat().st_size - 5)


def lengthen(path):
    with open(path, "ab") as stream:
        stream.write(b"x" * 1000)


DAMAGES = (flip, shorten, lengthen, os.unlink)


@pytest.mark.parametrize("kind", ("*.part", "*.jsonl"))
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_what_is_damaged_is_done_again(tmp_path, damage, kind):
    src = even(tmp_path / "src", shards=2)
    quantize_checkpoint(src, tmp_path / "want")
    together(src, tmp_path / "dst", 3, of_rank=stop(2, after=2))
    parts = staging.unfinished_folder(tmp_path / "dst") / staging.PARTS_FOLDER
    for path in list(parts.glob(kind)):
        damage(path)
    succeeded(together(src, tmp_path / "dst", 2, resume=True))
    assert contents(tmp_path / "dst") == contents(tmp_path / "want")


def test_strange_files_in_the_folder_of_parts_do_not_count(tmp_path):
    src = write_folder(tmp_path / "src", shards=2)
    quantize_checkpoint(src, tmp_path / "want")
    together(src, tmp_path / "dst", 2, of_rank=stop(1))
    parts = staging.unfinished_folder(tmp_path / "dst") / staging.PARTS_FOLDER
    for name in ("0" * 16 + ".99.0.1.part", "0" * 16 + ".0.5.5.part", "0" * 16 + ".0.0.999.part", "notes.txt"):
        (parts / name).write_text("x")
    succeeded(together(src, tmp_path / "dst", 3, resume=True))
    assert contents(tmp_path / "dst") == contents(tmp_path / "want")


def test_what_was_put_together_halfway(tmp_path, monkeypatch):
    """A process that is killed while it appends to the first part leaves items twice."""
    from fourbit.checkpoint import parts

    src = write_folder(tmp_path / "src")
    quantize_checkpoint(src, tmp_path / "want")
    real = parts._copy

    def copy(source, target, left, check):
        real(source, target, left // 2, check)
        target.flush()
        raise OSError(errno.EIO, "gone")

    with monkeypatch.context() as patch:
        patch.setattr(parts, "_copy", copy)
        results = together(src, tmp_path / "dst", 2)
        assert all(isinstance(each, CheckpointError) and "gone" in str(each) for each in results)
    succeeded(together(src, tmp_path / "dst", 3, resume=True))
    assert contents(tmp_path / "dst") == contents(tmp_path / "want")


def test_read_back(tmp_path, monkeypatch):
    """What was written is read again, each part by somebody, also what was there before."""
    from fourbit.checkpoint import parts

    src = write_folder(tmp_path / "src", shards=2)
    together(src, tmp_path / "dst", 2, max_shard_size=SHARD_BYTES, of_rank=stop(1, after=3))
    real = parts.join

    def join(unfinished, shard, *rest):
        real(unfinished, shard, *rest)
        whole = next(unfinished.glob(f"parts/*.{number[shard.file]}.0.{len(shard.items)}.part"))
        if number[shard.file] == broken[0]:
            flip(whole)

    quantize_checkpoint(src, tmp_path / "want", max_shard_size=SHARD_BYTES)
    files = sorted(path.name for path in (tmp_path / "want").glob("*.safetensors"))
    number = {name: i for i, name in enumerate(files)}
    broken = [0]
    monkeypatch.setattr(parts, "join", join)
    for broken[0] in range(len(files)):
        results = together(src, tmp_path / "dst", 2, max_shard_size=SHARD_BYTES, resume=True)
        assert all(isinstance(each, CheckpointError) and "reading back" in str(each) for each in results), results
        assert not (tmp_path / "dst").exists()


# ---- what goes wrong


@pytest.mark.parametrize("rank", (0, 1, 2))
def test_one_fails(tmp_path, rank):
    src = even(tmp_path / "src")
    results = together(src, tmp_path / "dst", 3, of_rank=stop(rank, error=RuntimeError("the cooling is off")))
    assert isinstance(results[rank], RuntimeError)
    for other in {0, 1, 2} - {rank}:
        assert isinstance(results[other], CheckpointError)
        assert f"process {rank} (" in str(results[other]) and "the cooling is off" in str(results[other])


@pytest.mark.parametrize("name", QUANTIZED)
def test_non_finite_leaves_nothing(tmp_path, name):
    tensors = sample_tensors()
    tensors[name].view(-1)[5] = float("nan")
    src = write_folder(tmp_path / "src", tensors)
    results = together(src, tmp_path / "dst", 3)
    assert all(isinstance(each, (fourbit.NonFiniteError, CheckpointError)) for each in results)
    assert all(name in str(each) for each in results) and os.listdir(tmp_path) == ["src"]


def test_the_disk_of_one_is_full(tmp_path, monkeypatch):
    src = write_folder(tmp_path / "src")
    quantize_checkpoint(src, tmp_path / "want")
    real = output.Output._write

    def full(self, data):
        if ".1.jsonl" in self._journal._stream.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(output.Output, "_write", full)
        results = together(src, tmp_path / "dst", 2)
    assert all("No space left on device" in str(each) and "--resume continues" in str(each) for each in results)
    assert str(results[0]).startswith("process 1 (") and not (tmp_path / "dst").exists()
    succeeded(together(src, tmp_path / "dst", 2, resume=True))
    assert contents(tmp_path / "dst") == contents(tmp_path / "want")


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    src = write_folder(tmp_path / "src")
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    results = together(src, tmp_path / "dst", 2)
    assert all("has 1,000 bytes free, and" in str(each) for each in results) and os.listdir(tmp_path) == ["src"]


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(team, "JOIN_SECONDS", 1.0)
    src = write_folder(tmp_path / "src")
    (tmp_path / "file").write_text("")
    results = together(src, tmp_path / "file" / "dst", 2)
    assert all(isinstance(each, CheckpointError) for each in results)
    assert "cannot write in" in str(results[0]) and "process 0 has not begun" in str(results[1])


@pytest.mark.parametrize("options", ({}, {"overwrite": True}))
def test_a_destination_that_is_there(tmp_path, options):
    src = write_folder(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "letters.txt").write_text("dear")
    results = together(src, tmp_path / "dst", 2, **options)
    assert all(isinstance(each, CheckpointError) for each in results)
    assert all(("holds something else" if options else "exists already") in str(each) for each in results)
    assert contents(tmp_path / "dst") == {"letters.txt": b"dear"}


def test_those_who_do_not_come(tmp_path, monkeypatch):
    monkeypatch.setattr(team, "JOIN_SECONDS", 1.0)
    monkeypatch.setattr(team, "LEAVE_SECONDS", 0.2)
    src = write_folder(tmp_path / "src")
    results = together(src, tmp_path / "dst", 3, only=(0, 2))
    assert "of 3 processes 1 did not come within 1 s (rank 1)" in str(results[0])
    assert "did not come" in str(results[2]) or "has not begun" in str(results[2])
    results = together(src, tmp_path / "other", 2, only=(1,))
    assert "process 0 has not begun within 1 s" in str(results[1])
    assert os.listdir(tmp_path) == ["src"]


WRONG = {"components": ["unet"]}
"""Options of one process with which it fails before it has told anybody that it is there."""


@pytest.fixture
def quickly():
    """Nobody waits for one that does not come."""
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < team.JOIN_SECONDS / 2


@pytest.mark.parametrize("late", (None, 0, 1))
@pytest.mark.parametrize("rank", (0, 1, 2))
def test_one_fails_at_its_beginning(tmp_path, rank, late, quickly):
    def of_rank(each):
        if each == late:
            time.sleep(0.3)
        return WRONG if each == rank else {}

    src = write_folder(tmp_path / "src")
    results = together(src, tmp_path / "dst", 3, of_rank=of_rank)
    assert all(isinstance(each, CheckpointError) and "is no pipeline" in str(each) for each in results), results
    for each, result in enumerate(results):
        assert str(result).startswith(f"process {rank} (") == (each != rank)
    assert os.listdir(tmp_path) == ["src"]


@pytest.mark.parametrize("rank", (0, 1))
def test_one_fails_at_the_beginning_of_a_resumed_run(tmp_path, rank, quickly):
    src = even(tmp_path / "src")
    quantize_checkpoint(src, tmp_path / "want")
    together(src, tmp_path / "dst", 2, of_rank=stop(1, after=3))
    results = together(src, tmp_path / "dst", 2, resume=True, of_rank=lambda each: WRONG if each == rank else {})
    assert all("is no pipeline" in str(each) for each in results), results
    assert succeeded(together(src, tmp_path / "dst", 2, resume=True))[0].resumed_bytes > 0
    assert contents(tmp_path / "dst") == contents(tmp_path / "want")


@pytest.mark.parametrize("convert", (quantize_checkpoint, dequantize_checkpoint))
def test_all_fail_at_their_beginning(tmp_path, convert, quickly):
    results = together(tmp_path / "src", tmp_path / "new" / "place" / "dst", 3, convert)
    assert all(isinstance(each, CheckpointError) and "src does not exist" in str(each) for each in results), results
    assert os.listdir(tmp_path) == []


def test_nobody_is_told_of_a_finished_folder(tmp_path, quickly):
    """Where all others have found it finished, the leader alone reads it."""
    src = write_folder(tmp_path / "src")
    succeeded(together(src, tmp_path / "dst", 2))
    flip(tmp_path / "dst" / "model.safetensors")
    results = together(src, tmp_path / "dst", 2, resume=True)
    assert "was finished and is damaged since" in str(results[0]) and isinstance(results[1], QuantizeReport)


@pytest.mark.parametrize("rank", (0, 1))
def test_one_fails_and_the_others_do_not_come(tmp_path, monkeypatch, caplog, rank):
    monkeypatch.setattr(team, "JOIN_SECONDS", 0.5)
    monkeypatch.setattr(team, "LEAVE_SECONDS", 0.1)
    results = together(tmp_path / "src", tmp_path / "dst", 2, only=(rank,))
    assert "src does not exist" in str(results[rank]) and os.listdir(tmp_path) == []
    (said,) = caplog.messages
    assert "src does not exist" in said and said.endswith("until the other processes know, 0 s at most, this one waits")


@pytest.mark.parametrize("rank", (0, 1))
def test_ctrl_c_ends_the_waiting(tmp_path, monkeypatch, rank, quickly):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(team.time, "sleep", interrupt)
    with pytest.raises(CheckpointError, match="src does not exist"):
        quantize_checkpoint(tmp_path / "src", tmp_path / "dst", processes=Processes(rank, 2))
    assert os.listdir(tmp_path) == []


def test_another_configuration_in_one_process(tmp_path):
    src = write_folder(tmp_path / "src")
    results = together(
        *(src, tmp_path / "dst", 2), of_rank=lambda rank: {"config": fourbit.QuantConfig(blocksize=32 << rank)}
    )
    assert "process 1" in str(results[0])
    for each in results:
        assert "is to do something else than process 0: blocksize is 64, was 32" in str(each)


@pytest.mark.parametrize("rank", (0, 1))
def test_one_says_nothing_more(tmp_path, monkeypatch, rank):
    """As a process that is killed, or whose machine is gone: the others end within SILENT_SECONDS."""
    monkeypatch.setattr(team, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(team, "LEAVE_SECONDS", 0.5)
    src = write_folder(tmp_path / "src")
    held = threading.Event()
    real = team.Team._write

    def write(self):
        if not (held.is_set() and self.processes.rank == rank):
            real(self)

    def hold(name, done, total):
        held.set()
        assert not over.wait(30)

    over = threading.Event()
    monkeypatch.setattr(team.Team, "_write", write)
    found: dict[int, object] = {}

    def run(each):
        try:
            progress = {"progress": hold} if each == rank else {}
            quantize_checkpoint(src, tmp_path / "dst", processes=Processes(each, 2), **progress)
        except BaseException as error:
            found[each] = error

    threads = {each: threading.Thread(target=run, args=(each,)) for each in (0, 1)}
    for thread in threads.values():
        thread.start()
    threads[1 - rank].join(20)
    assert not threads[1 - rank].is_alive(), "it hangs"
    assert f"process {rank} (" in str(found[1 - rank]) and "has said nothing for 1 s" in str(found[1 - rank])
    over.set()
    threads[rank].join(20)
    assert not (tmp_path / "dst").exists()


def test_two_runs_at_once(tmp_path):
    src = write_folder(tmp_path / "src")
    quantize_checkpoint(src, tmp_path / "want")
    said = []

    def second(name, done, total):
        if not said:
            for options in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(CheckpointError, match="another run is writing"):
                    quantize_checkpoint(src, tmp_path / "dst", **options)
                for rank in (0, 1):  # which neither take a place in it, nor wait
                    with pytest.raises(CheckpointError, match="another run is writing"):
                        quantize_checkpoint(src, tmp_path / "dst", processes=Processes(rank, 2), **options)
            said.append(True)

    succeeded(together(src, tmp_path / "dst", 2, of_rank=lambda rank: {} if rank else {"progress": second}))
    assert said and contents(tmp_path / "dst") == contents(tmp_path / "want")


def test_a_run_on_another_machine_where_locks_do_not_reach(tmp_path, monkeypatch):
    src = write_folder(tmp_path / "src")
    quantize_checkpoint(src, tmp_path / "want")
    monkeypatch.setattr(staging.FileLock, "acquire", lambda self: None)
    monkeypatch.setattr(staging.FileLock, "release", lambda self, force=False: None)
    names = iter([*("there",) * 2, *("here",) * 100])
    monkeypatch.setattr(team.socket, "gethostname", lambda: next(names))
    said = []

    def second(name, done, total):
        if not said:
            with pytest.raises(CheckpointError, match="another run is writing there: there, process"):
                quantize_checkpoint(src, tmp_path / "dst", resume=True)
            said.append(True)

    succeeded(together(src, tmp_path / "dst", 2, of_rank=lambda rank: {} if rank else {"progress": second}))
    assert said and contents(tmp_path / "dst") == contents(tmp_path / "want")


def test_a_process_of_an_earlier_run_does_no_harm(tmp_path):
    """It writes on while a new run continues: nothing that it writes then counts, and it ends by itself."""
    src = write_folder(tmp_path / "src")
    quantize_checkpoint(src, tmp_path / "want")
    found: dict[str, object] = {}
    began, over = threading.Event(), threading.Event()

    def hold(name, done, total):
        began.set()
        assert over.wait(30)

    def stale(rank, progress):
        try:
            quantize_checkpoint(src, tmp_path / "dst", processes=Processes(rank, 2), progress=progress)
        except BaseException as error:
            found[rank] = error

    old = [
        threading.Thread(target=stale, args=(0, stop(0)(0)["progress"])),
        threading.Thread(target=stale, args=(1, hold)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(team, "LEAVE_SECONDS", 0.1)
        for thread in old:
            thread.start()
        assert began.wait(20)
        old[0].join(20)
    succeeded(together(src, tmp_path / "dst", 2, resume=True))
    over.set()
    old[1].join(20)
    assert isinstance(found[1], CheckpointError) and contents(tmp_path / "dst") == contents(tmp_path / "want")
    assert sorted(os.listdir(tmp_path)) == ["dst", "src", "want"]


def test_memory_is_bounded_for_each(tmp_path, monkeypatch):
    """What one process reads ahead is bounded as it is for one alone."""
    from fourbit.checkpoint.pipeline import Pipeline

    budgets = []
    real = Pipeline.__init__

    def init(self, **options):
        budgets.append(options["budget"])
        real(self, **options)

    src = write_folder(tmp_path / "src", {f"layers.{i}.q_proj.weight": torch.randn(64, 64) for i in range(40)})
    monkeypatch.setattr(Pipeline, "__init__", init)
    succeeded(together(src, tmp_path / "dst", 3))
    assert budgets == [2 * 64 * 64 * 4] * 3
