"""A dispatch mode that watches."""

from torch.utils._python_dispatch import TorchDispatchMode


class Ops(TorchDispatchMode):
    """The names of the ops that come to a dispatch mode."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))
