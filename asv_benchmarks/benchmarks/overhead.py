"""What fourbit adds to a kernel: at most 4 µs from a public op to the backend's method, 10 µs from a module call."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from harness.calls import microseconds
from harness.null_backend import overhead_calls


class Overhead:
    """Calls with a [1, 64] input on a [64, 64] weight, whose kernel does nothing."""

    def setup(self):
        torch.manual_seed(0)
        self.stack = ExitStack()
        calls, plain, x = self.stack.enter_context(overhead_calls())
        self.method, self.op, self.module, *_ = calls.values()
        self.plain = lambda: plain(x)
        self.stack.enter_context(torch.no_grad())

    def teardown(self):
        self.stack.close()

    def time_backend_method(self):
        self.method()

    def time_public_op(self):
        self.op()

    def time_module_call(self):
        self.module()

    def time_nn_linear(self):
        self.plain()

    def track_dispatch(self):
        """Public op minus the backend's method."""
        return self._over_the_method(self.op)

    def track_module(self):
        """Linear4bit.__call__ minus the backend's method."""
        return self._over_the_method(self.module)

    def _over_the_method(self, call):
        times = microseconds({"method": self.method, "call": call}, rounds=31)
        return times["call"] - times["method"]


Overhead.track_dispatch.unit = Overhead.track_module.unit = "µs"
