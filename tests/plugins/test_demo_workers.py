"""The demo's steps in processes of their own."""

from __future__ import annotations

import pytest

from fourbit_demo import workers


def test_worker_reports(tmp_path, monkeypatch):
    """Progress and result come through, whatever else the worker prints."""
    (tmp_path / "toy_worker.py").write_text(
        "import sys\n"
        "from fourbit_demo.workers import Channel\n"
        "c = Channel(); print('noise'); c.progress(1, 2); c.progress(2, 2)\n"
        "if sys.argv[1] == 'die': raise ValueError('no luck')\n"
        "c.result({'answer': 42})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen = []
    assert workers.run("toy", "toy_worker", ["live"], lambda *step: seen.append(step)) == {"answer": 42}
    assert seen == [(1, 2), (2, 2)]
    with pytest.raises(workers.WorkerError, match="^toy failed: ValueError: no luck$") as failed:
        workers.run("toy", "toy_worker", ["die"])
    assert "Traceback" in failed.value.details
