"""Models that a plugin knows: the class that a folder's config.json names, built without weights.

Plugins are the modules that entry points of the group `fourbit.models` name. They are imported when a folder is
planned, never by `import fourbit`; what one breaks is a reason to judge by names, and no more.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registration

GROUP = "fourbit.models"

MOST_SECONDS = 60.0
"""Longest that a model is built for."""


@dataclass(frozen=True)
class Target:
    """Where a folder's tensor goes: names of the model's tensors, and whether its values are rearranged on the way
    (stacked, split, transposed) rather than only renamed."""

    names: tuple[str, ...]
    rearranged: bool = False


@dataclass(frozen=True)
class KnownModel:
    """What a plugin's `fourbit_describe_model` returns.

    Attributes:
        model: with its parameters on the meta device.
        targets: of the folder's tensors, by name; without those that the model does not have.
        source: what to call it, such as "transformers' LlamaForCausalLM".
    """

    model: nn.Module
    targets: Mapping[str, Target] = field(repr=False)
    source: str


def ask(config: dict[str, Any], names: tuple[str, ...]) -> tuple[KnownModel | None, str]:
    """The model of a folder with this config.json and these tensors, and why there is none."""
    reasons = []
    for plugin, describe in _plugins().items():
        try:
            found = describe(config=config, names=names)
            if isinstance(found, KnownModel):
                return found, ""
            if found is not None:
                reasons.append(f"{plugin} returned {type(found).__name__}, not a KnownModel")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # such as a panic of a library in Rust
            reasons.append(f"{plugin}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return None, "; ".join(reasons) or "its config.json names no class that a plugin knows"


@cache
def _plugins() -> dict[str, Callable[..., Any]]:
    """The hook of each plugin, by the entry point's name; one that cannot be imported raises when it is asked."""
    from importlib.metadata import entry_points

    def load(entry_point: Any) -> Callable[..., Any]:
        import pluggy

        from fourbit import hookspecs

        def ask_one(**arguments: Any) -> Any:
            manager = pluggy.PluginManager("fourbit")
            manager.add_hookspecs(hookspecs)
            manager.register(entry_point.load(), name=entry_point.name)
            return manager.hook.fourbit_describe_model(**arguments)

        return ask_one

    return {ep.name: load(ep) for ep in sorted(entry_points(group=GROUP), key=lambda ep: ep.name)}


class TooLargeError(RuntimeError):
    """A config.json asks for a model that no weights in the folder could fill, or that takes too long to build."""


@contextmanager
def without_weights(names: tuple[str, ...]) -> Iterator[None]:
    """For plugins: build a model for a folder with tensors `names` inside, on the meta device and without warnings.

    A config.json comes from a stranger: one that asks for absurdly many layers raises TooLargeError.
    """
    most, end, thread = 10_000 + 20 * len(names), time.monotonic() + MOST_SECONDS, threading.get_ident()
    count = 0

    def registered(*_: Any) -> None:
        nonlocal count
        if threading.get_ident() != thread:
            return
        count += 1
        if count > most:
            raise TooLargeError(f"its config.json asks for more than {most} modules and parameters")
        if time.monotonic() > end:
            raise TooLargeError(f"building the model that its config.json names takes more than {MOST_SECONDS:.0f} s")

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for register in (
            registration.register_module_module_registration_hook,
            registration.register_module_parameter_registration_hook,
        ):
            stack.callback(register(registered).remove)
        stack.enter_context(torch.device("meta"))
        yield
