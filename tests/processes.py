"""Several processes on this machine, for tests of what is distributed."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from tests.support import skip_or_fail


def worker(rank: int, function: Callable[..., None], count: int, port: int, device: str, *args: Any) -> None:
    import warnings

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, rank=rank, world_size=count)
    function(rank, *args)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # gloo's threads may outlive the group, and abort a process that ends in the ordinary way, about once in 50 runs
    os._exit(0)


def spawn(function: Callable[..., None], *args: Any, count: int = 2, device: str = "cpu") -> None:
    """`function(rank, *args)` in `count` processes of a gloo group, or NCCL's; raises what one of them raises."""
    if device == "cuda" and torch.cuda.device_count() < count:
        pytest.skip(f"this wants {count} GPUs")
    if not torch.distributed.is_available():
        skip_or_fail("this torch is built without torch.distributed")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (function, count, port, device, *args), nprocs=count)
