"""Built-in backends, one folder each; README.md beside this file says how to add one.

`fourbit.backends()` is the public function that lists the backends, and importing anything from this package
makes Python set `fourbit.backends` to the package. So the package can be called, and does the same.
"""

from __future__ import annotations

import sys
from types import ModuleType

from fourbit.registry import BackendInfo
from fourbit.registry import backends as _backends


class _Callable(ModuleType):
    def __call__(self) -> list[BackendInfo]:
        """See `fourbit.registry.backends`."""
        return _backends()


sys.modules[__name__].__class__ = _Callable
