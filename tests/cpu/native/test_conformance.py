"""The whole conformance suite on every instruction set: in guarded memory, with sanitizers, and on 64-bit ARM.

Each call runs three times, with 1, 2 and 3 threads and in differently placed buffers, and must give the same bits
(server.cpp).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpu.native.builds import VARIANTS

pytestmark = pytest.mark.long  # half a minute for a build, and a minute for each of the variants
ROOT = Path(__file__).parents[3]
# the root comes last in the path, so that what is installed wins
PROGRAM = f"import sys; sys.path.append({str(ROOT)!r}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"


@pytest.mark.long
@pytest.mark.parametrize(("build", "isa"), VARIANTS)
def test_suite(server_command, build, isa, tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "FOURBIT_"))}
    env |= {"FOURBIT_TEST_SERVER": json.dumps([server_command(build, isa), isa]), "OMP_NUM_THREADS": "1"}
    command = [
        *(sys.executable, "-c", PROGRAM, "-p", "tests.cpu.native.plugin", "--pyargs", "fourbit.testing"),
        *("--backend", "native-server", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=5"),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1800)
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr
    assert " passed" in done.stdout and " failed" not in done.stdout
    assert "declines nothing" in done.stdout, "an op was not tested"
