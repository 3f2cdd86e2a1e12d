"""Embedding4bit: an embedding table in 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fourbit.config import QuantConfig
from fourbit.nn.packed import PackedModule


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
        self._setup((num_embeddings, embedding_dim), quant_type, blocksize, double_quant, dtype, device)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, config: QuantConfig | None = None, name: str = "weight"
    ) -> Embedding4bit:
        """Quantize an nn.Embedding.

        Raises ValueError if it has a max_norm, which rewrites the table during lookups.
        """
        if embedding.max_norm is not None:
            raise ValueError("an embedding with max_norm rewrites its table on every lookup: it cannot be frozen")
        config = config or QuantConfig()
        result = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            quant_type=config.quant_type,
            blocksize=config.blocksize,
            double_quant=config.double_quant,
            dtype=embedding.weight.dtype,
            device=embedding.weight.device,
        )
        if embedding.weight.device.type != "meta":
            result.store(embedding.weight, name)
        result.train(embedding.training)
        return result

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
