"""What fourbit adds to a kernel: at most 4 µs from a public op to the backend's method, 10 µs from a module call.

And what forward and backward of a layer cost the host: at most 1.3 times torch's nn.Linear.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch

from harness.calls import microseconds
from harness.null_backend import overhead_calls, training_layers
from harness.training import training_microseconds


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


class Training:
    """Forward and backward with x [1, 64] and a frozen weight [64, 64], over those of nn.Linear with its kernels."""

    params = ("Linear4bit", "Linear4bit, double_quant", "autograd.Function that does nothing")
    param_names = ("layer",)

    def setup(self, layer):
        torch.manual_seed(0)
        self.stack = ExitStack()
        layers, self.x = self.stack.enter_context(training_layers())
        self.layers = {name: layers[name] for name in ("torch nn.Linear", layer)}

    def teardown(self, layer):
        self.stack.close()

    def track_one_layer(self, layer):
        """A whole call, `torch.autograd.grad` included."""
        return self._ratio(layer, 0)

    def track_each_layer_of_a_stack(self, layer):
        """What one layer more adds."""
        return self._ratio(layer, 1)

    def _ratio(self, layer, which):
        times = training_microseconds(self.layers, self.x, rounds=31)
        return times[layer][which] / times["torch nn.Linear"][which]


Training.track_one_layer.unit = Training.track_each_layer_of_a_stack.unit = "ratio"
