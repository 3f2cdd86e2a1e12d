"""The mapper of names through which vLLM runs the stream of a folder's tensors.

vLLM asks the quantization's configuration for one and merges it with the model's own. This one hands on one
PackedTensor for each packed weight, under the weight's name, so that vLLM's renames and stacking apply to it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from vllm.model_executor.models.utils import WeightsMapper

from fourbit_vllm.gather import gathered


class PackedWeights(WeightsMapper):  # type: ignore[misc]
    """A mapper that first puts packed weights together. Merged with others, on either side, it stays one."""

    def __or__(self, other: WeightsMapper) -> PackedWeights:
        return _merged(self, other)

    def __ror__(self, other: WeightsMapper) -> PackedWeights:
        return _merged(other, self)

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """The tensors by their names in vLLM's model."""
        return super().apply(gathered(weights))  # type: ignore[no-any-return]


def _merged(first: WeightsMapper, second: WeightsMapper) -> PackedWeights:
    return PackedWeights(**vars(WeightsMapper.__or__(first, second)))
