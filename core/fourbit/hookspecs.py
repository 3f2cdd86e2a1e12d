"""The pluggy hooks. A plugin is a module named by an entry point of the group `fourbit.backends`.

    # pyproject.toml of the plugin
    [project.entry-points."fourbit.backends"]
    mychip = "my_package.fourbit_backend"

    # my_package/fourbit_backend.py
    from fourbit.hookspecs import hookimpl

    @hookimpl
    def fourbit_register_backends(register):
        register(MyBackend())

The hooks that register are historic: they run once for each plugin, when fourbit first needs a backend, or when
the program calls `fourbit.plugins.manager().register(plugin)`; never per op.

A plugin that knows the models of a library is named by an entry point of the group `fourbit.models` instead, and
implements `fourbit_describe_model`, `fourbit_model_quantized` and `fourbit_model_dequantized`. It is imported when a
model folder is planned or a model quantized, so it should import its library only once it is asked about a model of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

from fourbit.backend import Backend
from fourbit.codebooks import Codebook
from fourbit.config import QuantConfig

if TYPE_CHECKING:
    from torch import nn

    from fourbit.plans.known import KnownModel

hookspec = pluggy.HookspecMarker("fourbit")
hookimpl = pluggy.HookimplMarker("fourbit")


@hookspec(historic=True)
def fourbit_register_backends(register: Callable[[Backend], None]) -> None:
    """Call `register(backend)` for each backend of the plugin.

    A backend that does not fit (its api_version, its name) is left out with a warning and listed by
    `fourbit.backends()`; `register` does not raise.
    """


@hookspec(historic=True)
def fourbit_register_codebooks(register: Callable[[Codebook], None]) -> None:
    """Call `register(Codebook(name, values, signed_scale))` for each 4-bit data type of the plugin.

    The name becomes a `quant_type`, in memory and on disk.
    """


@hookspec(firstresult=True)
def fourbit_describe_model(config: dict[str, Any], names: tuple[str, ...]) -> KnownModel | None:
    """The model that a folder is of, built without weights on the meta device; None if it is not one of yours.

    `config` is the folder's config.json and `names` are its tensors'. Both come from a stranger: build inside
    `fourbit.plans.known.without_weights(names)`, run no code of the folder and fetch nothing. An exception is kept as
    the reason for which the folder is judged by names.
    """


@hookspec
def fourbit_model_quantized(model: nn.Module, config: QuantConfig) -> None:
    """`quantize_model(model, config)` has just put 4-bit modules into `model`, in memory.

    The place to tell your library of it, for `model` and for what it is composed of: how such a model is saved, say.
    Every plugin is told; an exception becomes a warning.
    """


@hookspec
def fourbit_model_dequantized(model: nn.Module) -> None:
    """`dequantize_model(model)` has just put 16-bit modules in place of all 4-bit ones in `model`.

    The counterpart of `fourbit_model_quantized`: what that told your library holds no longer.
    """
