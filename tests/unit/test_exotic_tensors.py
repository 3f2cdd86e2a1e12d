"""Tensors that torch's dispatcher has to materialize first: negated and conjugated views, zeros without memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fourbit
from fourbit.backend import OPS
from fourbit.testing.exotic import KINDS
from fourbit.testing.oracle import assert_same_bits
from fourbit.testing.test_fake import arguments


def linear_arguments():
    """linear_4bit with a bias: (x, weight, 11, no nested scales, bias)."""
    return (*arguments("linear_4bit", torch.device("cpu")), None, None, None, torch.randn(11))
