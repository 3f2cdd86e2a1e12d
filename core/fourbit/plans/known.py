"""Models that a plugin knows: the class that a folder's config.json names, built without weights.

What a plugin of the group `fourbit.models` needs: the record that its hook returns, and how to build a model for it.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registration

MOST_SECONDS = 60.0
"""Longest that a model is built for."""


@dataclass(frozen=True)
class Target:
    """Where a folder's tensor goes.

    Attributes:
        names: of the model's tensors.
        rearranged: whether its values are (stacked, split, transposed) on the way, rather than only renamed.
        by_rows: and if so, whether every row stays whole: matrices are split between rows, or put below each other.
    """

    names: tuple[str, ...]
    rearranged: bool = False
    by_rows: bool = False


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
