"""An embedding table of narrow rows and one decoder: e(id) = U z(id) + mu.

    table D (V, d)  ->  codes Z (V, k), up U (d, k), mean mu (d,)        V k + d k + d numbers instead of V d

A look-up costs k numbers and d k multiply-adds. Not a `Structure`: that maps rows linearly, and this reads by index.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import empty_parameter, wide

__all__ = ["LowRankEmbedding"]


class LowRankEmbedding(nn.Module):
    """An embedding of V ids in d dimensions, of rank k around a mean.

    Args:
        num_embeddings: V.
        embedding_dim: d.
        rank: k, from 1 to d.
        padding_idx: id whose vector is stored as it is in the buffer ``padding`` (d,) and never trained; or None.
        sparse: whether the gradient of the codes is a sparse tensor.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Attributes:
        codes: (V, k).
        up: U (d, k).
        mean: (d,).

    Raises:
        ValueError: a size makes no sense.

    Example:
        >>> table = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 2.0]])
        >>> layer = LowRankEmbedding.from_table(table, torch.tensor([[1.0], [0.0]]), torch.tensor([2.0, 2.0]), 0)
        >>> layer(torch.tensor([0, 1, 2])).tolist(), layer.num_parameters()
        ([[0.0, 0.0], [1.0, 2.0], [3.0, 2.0]], 7)
    """

    type_name: ClassVar[str] = "low_rank_embedding"
    padding: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        *,
        padding_idx: int | None = None,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_embeddings < 1 or not 1 <= rank <= embedding_dim:
            shape = (num_embeddings, embedding_dim)
            raise ValueError(f"the rank of a {shape} table must be from 1 to its width, not {rank}")
        if padding_idx is not None and not 0 <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx must be one of {num_embeddings} ids, not {padding_idx}")
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.padding_idx, self.sparse = padding_idx, sparse
        self.codes = empty_parameter(num_embeddings, rank, device=device, dtype=dtype)
        self.up = empty_parameter(embedding_dim, rank, device=device, dtype=dtype)
        self.mean = empty_parameter(embedding_dim, device=device, dtype=dtype)
        padding = None if padding_idx is None else torch.empty(embedding_dim, device=device, dtype=dtype)
        self.register_buffer("padding", padding)

    @classmethod
    def from_table(
        cls,
        table: Tensor,
        basis: Tensor,
        mean: Tensor,
        padding_idx: int | None = None,
        *,
        sparse: bool = False,
    ) -> Self:
        """The projection of a table onto a basis around a mean: codes = (D - mu) U.

        Args:
            table: D (V, d).
            basis: U (d, k), orthonormal columns.
            mean: (d,).
            padding_idx: row that is kept exactly.
            sparse: see the class.
        """
        count, width = table.shape
        layer = cls(
            count, width, basis.shape[1], padding_idx=padding_idx, sparse=sparse, device=table.device, dtype=table.dtype
        )
        with torch.no_grad():
            layer.codes.copy_((table.to(basis.dtype) - mean.to(basis.dtype)) @ basis)
            layer.up.copy_(basis)
            layer.mean.copy_(mean)
            if layer.padding is not None and padding_idx is not None:
                layer.padding.copy_(table[padding_idx])
        return layer

    def lookup(self, ids: Tensor) -> Tensor:
        """The codes of ids (...), (..., k): what a layer that has taken over the decoder reads."""
        return F.embedding(ids, self.codes, self.padding_idx, sparse=self.sparse)

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors of ids (...), (..., d); the table is not rebuilt."""
        vectors = F.linear(self.lookup(ids), self.up, self.mean)
        if self.padding is None:
            return vectors
        return torch.where(ids.eq(self.padding_idx or 0)[..., None], self.padding, vectors)

    def dense(self) -> Tensor:
        """The table (V, d)."""
        table = (wide(self.codes) @ wide(self.up).mT + wide(self.mean)).to(self.codes.dtype)
        if self.padding is None or self.padding_idx is None:
            return table
        here = torch.arange(self.num_embeddings, device=table.device) == self.padding_idx
        return torch.where(here[:, None], self.padding, table)

    def num_parameters(self) -> int:
        """Stored floating point numbers, without the padding vector: V k + d k + d."""
        return sum(parameter.numel() for parameter in self.parameters())

    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return sum(t.numel() * t.element_size() for t in (*self.parameters(), *self.buffers()))

    def spec(self) -> dict[str, Any]:
        """What is needed to build the same module without its values, as plain JSON data."""
        names = ("num_embeddings", "embedding_dim", "rank", "padding_idx", "sparse")
        return {"type": self.type_name, **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_spec(
        cls, spec: Mapping[str, Any], *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Build the module of a spec; values uninitialised.

        Raises:
            ValueError: the spec is of another type, or lacks or adds an entry.
        """
        if spec.get("type") != cls.type_name:
            raise ValueError(f"{cls.__name__} reads specs of type {cls.type_name!r}, got {spec.get('type')!r}")
        try:
            return cls(**{name: v for name, v in spec.items() if name != "type"}, device=device, dtype=dtype)
        except TypeError as error:
            raise ValueError(f"spec of a {cls.type_name!r} has wrong entries: {error}") from error

    def extra_repr(self) -> str:
        """Constructor arguments."""
        return ", ".join(f"{name}={value}" for name, value in self.spec().items() if name != "type")
