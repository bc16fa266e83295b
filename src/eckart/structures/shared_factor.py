"""Several matrices with a factor in common: W_e = U V_e, or W_e = U_e V.

c matrices (m, n) of rank r store   left: r (m + c n)   right: r (n + c m)   instead of c m n numbers
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .base import empty_parameter, wide

__all__ = ["FactorSide", "SharedFactor"]

FactorSide = Literal["left", "right"]


class SharedFactor(nn.Module):
    """Matrices W_e (out, in) with one factor in common: W_e = U V_e ("left") or U_e V ("right").

    Args:
        count: Number c of matrices.
        in_features: Columns n.
        out_features: Rows m.
        rank: Inner size r.
        side: Which factor is shared.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        shared: Uᵀ (r, m) or Vᵀ (n, r), transposed as rows of x meet it.
        own: V_eᵀ (c, n, r) or U_eᵀ (c, r, m).

    Raises:
        ValueError: A size is not positive, or an unknown side.

    Example:
        >>> factor = SharedFactor.from_factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[[1.0]], [[3.0]]]), "left")
        >>> factor.dense().tolist(), factor(torch.tensor([[10.0]]), 1).tolist()
        ([[[1.0], [2.0]], [[3.0], [6.0]]], [[30.0, 60.0]])
    """

    def __init__(
        self,
        count: int,
        in_features: int,
        out_features: int,
        rank: int,
        side: FactorSide,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(count, in_features, out_features, rank) < 1 or side not in get_args(FactorSide):
            sizes = (count, in_features, out_features, rank)
            raise ValueError(f'sizes must be positive and side "left" or "right", not {sizes} and {side!r}')
        self.rank, self.side = rank, side
        common: dict[str, Any] = {"device": device, "dtype": dtype}
        first, second = (in_features, rank), (rank, out_features)
        self.shared = empty_parameter(*(second if side == "left" else first), **common)
        self.own = empty_parameter(count, *(first if side == "left" else second), **common)

    @classmethod
    def from_factors(
        cls, shared: Tensor, own: Tensor, side: FactorSide, *, dtype: torch.dtype | None = None
    ) -> SharedFactor:
        """Store U (m, r) and V_e (c, r, n), or V (r, n) and U_e (c, m, r); in ``dtype``, default that of ``shared``."""
        left, right = (shared, own) if side == "left" else (own, shared)
        made = cls(
            len(own), right.shape[-1], left.shape[-2], shared.shape[1 if side == "left" else 0], side,
            device=shared.device, dtype=dtype or shared.dtype,
        )  # fmt: skip
        made.load_state_dict({"shared": shared.mT, "own": own.mT})
        return made

    def forward(self, x: Tensor, index: int) -> Tensor:
        """x W_eᵀ of one matrix, x (tokens, n) -> (tokens, m)."""
        own = self.own[index]
        return x @ own @ self.shared if self.side == "left" else x @ self.shared @ own

    def dense(self) -> Tensor:
        """All W_e (c, m, n) in the dtype of the parameters; differentiable."""
        shared, own = wide(self.shared), wide(self.own)
        return (own @ shared if self.side == "left" else shared @ own).mT.to(self.shared.dtype)
