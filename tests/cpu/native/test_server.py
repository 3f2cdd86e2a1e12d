"""The server notices what it is there for: a check that cannot fail would prove nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.cpu.native.builds import BUILDS, VARIANTS, X86, instruction_sets
from tests.cpu.native.client import Server, ServerError

pytestmark = pytest.mark.long  # half a minute for each build
READ, WRITE = 0, 1
INPUT = torch.arange(70, dtype=torch.uint8)
OUTPUT = (torch.uint8, 70)


@pytest.fixture(params=["plain", "sanitized", *(["arm64"] if X86 else [])])
def server(request, server_command):
    with Server(server_command(request.param, "scalar"), "scalar") as server:
        yield server


def probe(server: Server, buffer: int, offset: int, kind: int) -> None:
    server.call("probe_access", buffer, offset, kind, INPUT, OUTPUT)


@pytest.mark.parametrize("buffer", (0, 1))
@pytest.mark.parametrize("offset", (-1, 70, 80, -40))
def test_stray_reads(server, buffer, offset):
    with pytest.raises(ServerError, match=r"ended with status (?!0)"):
        probe(server, buffer, offset, READ)
    probe(server, 0, 69, READ)  # a new process serves


@pytest.mark.parametrize("buffer", (0, 1))
@pytest.mark.parametrize("offset", (-1, 70))
def test_stray_writes(server, buffer, offset):
    with pytest.raises(ServerError, match=r"ended with status (?!0)|a write beside buffer"):
        probe(server, buffer, offset, WRITE)


def test_write_beside_an_output_without_a_guard(server):
    with pytest.raises(ServerError, match="a write beside buffer 1, with buffers that end at a page and 1 threads"):
        probe(server, 1, -1, WRITE)


def test_write_to_an_input(server):
    with pytest.raises(ServerError, match=r"ended with status (?!0)"):
        probe(server, 0, 5, WRITE)


def test_whole_pages_have_a_guard_on_both_sides(server):
    for offset in (-1, 8192):
        with pytest.raises(ServerError, match=r"ended with status (?!0)"):
            server.call("probe_access", 0, offset, WRITE, (torch.uint8, 8192))


def test_accesses_within_are_fine(server):
    for buffer in (0, 1):
        for offset in (0, 69):
            probe(server, buffer, offset, READ)
    probe(server, 1, 0, WRITE)


def test_results_that_depend_on_threads(server):
    with pytest.raises(ServerError, match="other results with buffers that begin at a page and 2 threads"):
        server.call("probe_threads", OUTPUT)


def test_the_report_says_where(server_command):
    where = r"70 bytes from the begin of buffer 0 \(input\), which has 70 bytes"
    with Server(server_command("plain", "scalar"), "scalar") as server, pytest.raises(ServerError, match=where):
        probe(server, 0, 70, READ)


@pytest.mark.skipif(not X86, reason="cpuid is x86's")
def test_dispatch_finds_what_the_system_says(server_command):
    """available_kernels against the kernel's list of the processor's features."""
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    avx512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    wanted = {"avx512_bf16": avx512 | {"avx512_bf16"}, "avx512": avx512, "avx2": {"avx2", "fma"}, "scalar": set()}
    found = instruction_sets(tuple(server_command("plain", "scalar")))
    assert list(found) == [isa for isa, needed in wanted.items() if needed <= flags]


def test_every_build_is_used():
    assert {build for build, _ in VARIANTS} | {"threads"} >= set(BUILDS) - (set() if X86 else {"arm64"})
