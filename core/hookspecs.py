"""The pluggy hooks. A plugin is a module named by an entry point of the group `fourbit.backends`.

    # pyproject.toml of the plugin
    [project.entry-points."fourbit.backends"]
    mychip = "my_package.fourbit_backend"

    # my_package/fourbit_backend.py
    from fourbit.hookspecs import hookimpl

    @hookimpl
    def fourbit_register_backends(register):
        register(MyBackend())

Hooks run once, when fourbit first needs a backend; never per op.
"""

from __future__ import annotations

from collections.abc import Callable

import pluggy

from fourbit.backend import Backend
from fourbit.codebooks import Codebook

hookspec = pluggy.HookspecMarker("fourbit")
hookimpl = pluggy.HookimplMarker("fourbit")


@hookspec
def fourbit_register_backends(register: Callable[[Backend], None]) -> None:
    """Call `register(backend)` for each backend of the plugin.

    A backend that does not fit (its api_version, its name) is left out with a warning and listed by
    `fourbit.backends()`; `register` does not raise.
    """


@hookspec
def fourbit_register_codebooks(register: Callable[[Codebook], None]) -> None:
    """Call `register(Codebook(name, values, signed_scale))` for each 4-bit data type of the plugin.

    The name becomes a `quant_type`, in memory and on disk.
    """
