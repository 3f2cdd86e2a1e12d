"""FourbitParameter: what stands in the place of a layer's weight while vLLM loads, and gathers the layer's parts.

vLLM's layers know which rows or columns of a tensor are this rank's, and where in a fused weight (q, k and v; gate and
up) they belong; they tell it to the parameter. It keeps the part alone: in 4 bits if it came so, or quantized here.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.parameter import BasevLLMParameter

from fourbit import codebooks
from fourbit.config import QuantConfig
from fourbit.functional import quantize_4bit, require_finite
from fourbit_vllm.packed import PackedTensor, Piece, Source, cut

_logger = init_logger(__name__)


class Rules(Protocol):
    """What a layer asks of the configuration."""

    def parts_of(self, prefix: str) -> list[str]: ...
    def quant_of(self, name: str, shape: tuple[int, ...]) -> QuantConfig | None: ...


class Loading:
    """Takes tensors as they come and keeps this rank's parts of them.

    Args:
        config: says what is quantized here.
        prefix: the layer's name, for messages.
        dtype: of parts that stay in 16 bit.
    """

    def __init__(self, config: Rules, prefix: str, dtype: torch.dtype) -> None:
        self.config, self.prefix, self.dtype = config, prefix, dtype
        self.device = torch.get_default_device()  # vLLM's, while it makes layers
        self.dummy = get_current_vllm_config().load_config.load_format == "dummy"
        self.parts: dict[tuple[int, ...], Piece | Tensor] = {}

    def all_parts(self, what: str, rows: int, width: int) -> list[Piece | Tensor]:
        """The parts in the order of their places; they are let go. Raises ValueError if they are not `rows` rows."""
        parts = [part for _, part in sorted(self.parts.items(), key=lambda item: item[0])]
        self.parts.clear()
        if not parts and self.dummy:
            return [self._random(rows, width)]
        found = sum(part.rows if isinstance(part, Piece) else part.shape[0] for part in parts)
        if found != rows:
            raise ValueError(f"{what}: the folder has {found} of the {rows} rows of its weight")
        return parts

    def _random(self, rows: int, width: int) -> Piece:
        """For `--load-format dummy`: any codes, in blocks of the default size where they fit."""
        size = 64 if width % 64 == 0 else 32
        codes = torch.randint(0, 256, (-(-rows * width // 2),), dtype=torch.uint8, device=self.device)
        scales = torch.full((-(-rows * width // size),), width**-0.5, dtype=torch.float32, device=self.device)
        return Piece(codes, scales, codebooks.get("nf4").tensor(self.device), size, rows, width)

    def take(
        self,
        place: tuple[int, ...],
        loaded: Tensor,
        shape: tuple[int, int],
        name: str = "",
        row: int = 0,
        column: int = 0,
    ) -> None:
        """Keep `shape` of `loaded` from `row` and `column` on, and remember its place.

        Args:
            name: of the tensor's layer as the folder calls it, for `skip_modules`.
        """
        if loaded.dim() != 2 or row + shape[0] > loaded.shape[0] or column + shape[1] > loaded.shape[1]:
            raise ValueError(
                f"{self.prefix}: the folder's weight is {list(loaded.shape)}, and this rank's part of it is"
                f" {list(shape)} from row {row} and column {column}"
            )
        quant = self.config.quant_of(name or self.prefix, tuple(loaded.shape))
        if quant is not None and not isinstance(loaded, PackedTensor):
            loaded = quantized(loaded.to(self.device), quant, name or self.prefix)
        part = loaded.narrow(0, row, shape[0]).narrow(1, column, shape[1])
        self.parts[place] = self._kept(part)

    def _kept(self, part: Tensor) -> Piece | Tensor:
        if not isinstance(part, PackedTensor):
            return part.to(self.device, self.dtype, copy=True)
        piece = cut(part)
        if piece is not None:
            return piece.copied(self.device)
        _logger.warning_once(
            "%s is in 16 bit: its part of the weight %s has borders inside blocks of 32",
            self.prefix,
            tuple(part.source.state.shape),
        )
        return part.unpacked().to(self.device, self.dtype)


def quantized(weight: Tensor, quant: QuantConfig, name: str) -> PackedTensor:
    """A 16-bit weight in 4 bits, with the bits that `fourbit quantize` gives it. Raises NonFiniteError."""
    require_finite(weight, name)
    codes, state = quantize_4bit(
        weight, quant_type=quant.quant_type, blocksize=quant.blocksize, double_quant=quant.double_quant
    )
    return PackedTensor(Source(codes, state))


class FourbitParameter(BasevLLMParameter):  # type: ignore[misc]
    """The weight of a linear layer while it is loaded: of its shape and dtype, on the meta device."""

    output_dim, input_dim = 0, 1

    def __init__(self, data: Tensor, weight_loader: Any, loading: Loading, names: list[str]) -> None:
        super().__init__(data=data, weight_loader=weight_loader)
        self.loading, self.names = loading, names

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Rows."""
        rows, width = self.shape
        self.loading.take((0,), loaded_weight, (rows, width), row=self.tp_rank * rows)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Columns."""
        rows, width = self.shape
        self.loading.take((0,), loaded_weight, (rows, width), column=self.tp_rank * width)

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        """Rows of one of several weights below each other."""
        self._fused(loaded_weight, self.tp_rank, kwargs)

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        """Rows of q, k or v; ranks share the heads of k and v where there are fewer heads than ranks."""
        rank = self.tp_rank if kwargs["shard_id"] == "q" else self.tp_rank // kwargs["num_heads"]
        self._fused(loaded_weight, rank, kwargs)

    def load_whole(self, loaded_weight: Tensor) -> None:
        """All of it, on each rank."""
        self.loading.take((0,), loaded_weight, tuple(self.shape))

    def _fused(self, loaded: Tensor, rank: int, kwargs: dict[str, Any]) -> None:
        size, offset, shard = kwargs["shard_size"], kwargs["shard_offset"], kwargs["shard_id"]
        number = self._shard_id_as_int(shard)
        name = self.names[number] if number < len(self.names) else ""
        self.loading.take((offset,), loaded, (size, self.shape[1]), name, row=rank * size)

    __torch_function__ = torch._C._disabled_torch_function_impl
