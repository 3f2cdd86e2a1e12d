"""Embedding4bit: an embedding table in 4 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fourbit.config import QuantConfig
from fourbit.nn.packed import PackedModule, options

if TYPE_CHECKING:
    from typing_extensions import Self


class Embedding4bit(PackedModule, nn.Embedding):  # type: ignore[misc]  # weight is a view, not a Parameter
    """A drop-in replacement for nn.Embedding whose table is frozen and stored in 4 bits.

    Args:
        num_embeddings, embedding_dim: as in nn.Embedding.
        padding_idx: as in nn.Embedding: the row of padding tokens, kept for those who ask. The row's values are
            those that were stored, zeros if the table came from an nn.Embedding with one.
        quant_type, blocksize, double_quant: see QuantConfig.
        dtype: of the result (None: torch's default).

    ids (int32 or int64, any shape) give [*ids.shape, embedding_dim]. A newly made one has no table yet and
    gives NaN: use `from_embedding`, `store` or `load_state_dict`.
    """

    replaces = nn.Embedding
    kind = "embedding"
    op = "embedding_4bit"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        quant_type: str = "nf4",
        blocksize: int | None = None,
        double_quant: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ValueError(f"padding_idx {padding_idx} is not within the {num_embeddings} embeddings")
            padding_idx %= num_embeddings
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        # what nn.Embedding has and a frozen table has no use for
        self.max_norm = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = False
        self.sparse = False
        self.setup((num_embeddings, embedding_dim), quant_type, blocksize, double_quant, dtype, device)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, config: QuantConfig | None = None, name: str = "weight") -> Self:
        """Quantize an nn.Embedding.

        Raises ValueError if it has a max_norm, which rewrites the table during lookups.
        """
        return cls.from_module(embedding, config, name)

    @classmethod
    def like(cls, replaced: nn.Embedding, config: QuantConfig, dtype: torch.dtype, device: torch.device) -> Self:
        """An empty one of the same size. Raises ValueError for one with a max_norm."""
        if replaced.max_norm is not None:
            raise ValueError("an embedding with max_norm rewrites its table on every lookup: it cannot be frozen")
        size = replaced.num_embeddings, replaced.embedding_dim
        return cls(*size, replaced.padding_idx, **options(config, dtype, device))

    def restored(self, weight: nn.Parameter) -> nn.Embedding:
        """An nn.Embedding with that table."""
        size = self.num_embeddings, self.embedding_dim
        new = nn.Embedding(*size, self.padding_idx, device="meta", dtype=weight.dtype)
        new.weight = weight
        return new

    def sample(self, rows: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """`rows` times the first id."""
        return (torch.zeros(rows, dtype=torch.int64, device=self.qweight.device),)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows `ids` of the table: [*ids.shape, embedding_dim] in the logical dtype."""
        weight, nested = self.packed_weight().flat()
        rows: Tensor = torch.ops.fourbit.embedding_4bit(
            ids, *weight, self.num_embeddings, self.embedding_dim, self.dtype, *nested
        )
        return rows

    def reset_parameters(self) -> None:
        """Nothing: the table is frozen, and random bits are no initialization."""

    def extra_repr(self) -> str:
        """As nn.Embedding's, and the quantization."""
        pad = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{super().extra_repr()}{pad}"
