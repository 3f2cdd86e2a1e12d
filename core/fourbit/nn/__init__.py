"""Modules that hold 4-bit weights: Linear4bit, Conv1D4bit, Embedding4bit, ExpertWeights4bit."""

from fourbit.nn.conv1d import Conv1D4bit
from fourbit.nn.embedding import Embedding4bit
from fourbit.nn.experts import ExpertWeights4bit
from fourbit.nn.linear import Linear4bit
from fourbit.nn.packed import PackedModule
from fourbit.nn.view import RequantizationWarning, WeightView

__all__ = [
    "Conv1D4bit",
    "Embedding4bit",
    "ExpertWeights4bit",
    "Linear4bit",
    "PackedModule",
    "RequantizationWarning",
    "WeightView",
]
