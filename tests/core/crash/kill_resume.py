"""Kills `quantize` with SIGKILL at random moments, resumes it, and compares every byte. Runs alone, too:

    python tests/core/crash/kill_resume.py --points 50

A warm process is forked for each run, so that a kill costs milliseconds and not the start of torch; the last few
kills go to the real command. POSIX only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from fourbit.checkpoint import output
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.staging import unfinished_folder
from fourbit.checkpoint.verify import verify_checkpoint

LAYERS = 40
SHARD_BYTES = 2_000_000


def make_source(folder: Path) -> Path:
    """40 layers of 512x256 bfloat16 in two files, 21 MB: a run takes some tenths of a second."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for half in range(2):
        tensors = {}
        for i in range(half * LAYERS // 2, (half + 1) * LAYERS // 2):
            weight = torch.randn(2, 512, 256, generator=generator).bfloat16()
            tensors[f"model.layers.{i}.q_proj.weight"] = weight[0].clone()
            tensors[f"model.layers.{i}.k_proj.weight"] = weight[1].clone()
            tensors[f"model.layers.{i}.norm.weight"] = torch.ones(256).bfloat16()
        save_file(tensors, folder / f"model-0000{half + 1}-of-00002.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}" * 1000)
    names = {f"model.layers.{i}.{n}.weight": i for i in range(LAYERS) for n in ("q_proj", "k_proj", "norm")}
    weight_map = {name: f"model-0000{2 * i // LAYERS + 1}-of-00002.safetensors" for name, i in names.items()}
    text = str({"metadata": {}, "weight_map": weight_map}).replace("'", '"')
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def make_pipeline(folder: Path) -> Path:
    """The same model twice in a pipeline of diffusers, to be quantized and to be carried over."""
    folder.mkdir()
    for name in ("transformer", "vae"):
        make_source(folder / name)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}" * 1000)
    listed = {"transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(listed))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fork_run(src: Path, dst: Path) -> int:
    """A child that quantizes, continuing what is there; its process id. Exit status 0 if it ends well."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        quantize_checkpoint(src, dst, resume=True, max_shard_size=SHARD_BYTES)
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def finish(pid: int) -> int:
    """Wait for a child: its exit status, negative if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check(dst: Path, want: dict[str, bytes]) -> None:
    """There is no destination, or it is right."""
    if dst.exists() and contents(dst) != want:
        raise AssertionError(f"{dst} is there and is not right")


def crash_in_library(work: Path, src: Path, want: dict[str, bytes], points: int, seconds: float) -> dict[str, int]:
    """Kill forked runs until `points` kills have hit a running one."""
    dice = random.Random(0)
    tally = {"kills": 0, "of which while resuming": 0, "resumes that reached the end": 0}
    while tally["kills"] < points:
        dst = work / f"dst{tally['resumes that reached the end']}"
        in_a_row = dice.randint(1, 5)
        for i in range(in_a_row):
            pid = fork_run(src, dst)
            time.sleep(dice.uniform(0, seconds * 1.02))
            os.kill(pid, signal.SIGKILL)
            status = finish(pid)
            check(dst, want)
            if status == 0:
                break
            assert status == -signal.SIGKILL, f"the run failed by itself, with status {status}"
            tally["kills"] += 1
            tally["of which while resuming"] += i > 0
        assert finish(fork_run(src, dst)) == 0, "resuming failed"
        assert contents(dst) == want, "the resumed run's bytes are others"
        assert verify_checkpoint(dst).ok and not unfinished_folder(dst).exists()
        tally["resumes that reached the end"] += 1
    return tally


def crash_command(work: Path, src: Path, points: int) -> int:
    """The same with the command itself; how many kills hit a running one."""
    command = [sys.executable, "-m", "fourbit.cli", "quantize", "--resume", str(src)]
    begin = time.monotonic()
    subprocess.run([*command, str(work / "whole")], check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - begin
    want, dst, dice, hits = contents(work / "whole"), work / "command", random.Random(1), 0
    for _ in range(points):
        child = subprocess.Popen([*command, str(dst)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(dice.uniform(0.5, 1) * seconds)
        child.kill()
        hits += child.wait() == -signal.SIGKILL
        check(dst, want)
    subprocess.run([*command, str(dst)], check=True, stdout=subprocess.DEVNULL)
    check(dst, want)
    assert dst.exists()
    return hits


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=50, help="kills that must hit a running process")
    parser.add_argument("--command-points", type=int, default=3, help="kills of the real command besides")
    parser.add_argument("--pipeline", action="store_true", help="a folder of several models instead of one")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # no pool of threads, which a fork would lack
    output.SYNC_SECONDS = 0.0  # a small model's run would be over before anything is noted
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        src = (make_pipeline if options.pipeline else make_source)(work / "src")
        source = contents(src)
        begin = time.monotonic()
        assert finish(fork_run(src, work / "want")) == 0
        seconds = time.monotonic() - begin
        tally = crash_in_library(work, src, contents(work / "want"), options.points, seconds)
        tally["kills of the command"] = crash_command(work, src, options.command_points)
        assert contents(src) == source, "the source was touched"
        print(f"one run: {seconds:.2f} s; " + ", ".join(f"{key}: {value}" for key, value in tally.items()))
        print("every byte is that of the uninterrupted run")


if __name__ == "__main__":
    main()
