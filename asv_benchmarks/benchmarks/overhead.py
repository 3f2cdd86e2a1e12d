"""What fourbit adds to a kernel: at most 4 µs from a public op to the backend's method, 10 µs from a module call."""

from __future__ import annotations

from contextlib import ExitStack

import torch

import fourbit

from .measure import microseconds
from .null_backend import null_backend

SIZE = 64


class Overhead:
    """Calls with a [1, 64] input on a [64, 64] weight, whose kernel does nothing."""

    def setup(self):
        torch.manual_seed(0)
        self.stack = ExitStack()
        backend = self.stack.enter_context(null_backend(torch.zeros(1, SIZE)))
        self.plain = torch.nn.Linear(SIZE, SIZE, bias=False)
        self.x = torch.randn(1, SIZE)
        self.packed, self.state = fourbit.quantize_4bit(self.plain.weight.detach(), blocksize=64)
        self.module = fourbit.nn.Linear4bit.from_linear(self.plain, fourbit.QuantConfig(blocksize=64))
        self.method = backend.linear_4bit
        self.arguments = (self.x, self.packed, self.state.absmax, self.state.code, 64, SIZE, None, None, None, None)
        self.no_grad = self.stack.enter_context(torch.no_grad())

    def teardown(self):
        self.stack.close()

    def time_backend_method(self):
        self.method(*self.arguments)

    def time_public_op(self):
        fourbit.linear_4bit(self.x, self.packed, self.state)

    def time_module_call(self):
        self.module(self.x)

    def time_nn_linear(self):
        self.plain(self.x)

    def track_dispatch(self):
        """Public op minus the backend's method."""
        times = self._times()
        return times["op"] - times["method"]

    def track_module(self):
        """Linear4bit.__call__ minus the backend's method."""
        times = self._times()
        return times["module"] - times["method"]

    def _times(self):
        return microseconds(
            {"method": self.time_backend_method, "op": self.time_public_op, "module": self.time_module_call},
            rounds=31,
        )


Overhead.track_dispatch.unit = Overhead.track_module.unit = "µs"
