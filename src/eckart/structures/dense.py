"""A dense linear map, for a matrix whose shape changed or whose rank reached break-even."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Structure, empty_parameter

__all__ = ["Dense"]


class Dense(Structure):
    """A plain weight W (out, in): y = x W^T + b.

    Args:
        in_features: Columns of W.
        out_features: Rows of W.
        bias: Whether a bias (out,) is added.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Example:
        >>> layer = Dense.from_weight(torch.tensor([[1.0, 2.0]]), bias=torch.tensor([0.5]))
        >>> layer(torch.tensor([[1.0, 1.0]])).tolist(), layer.num_parameters()
        ([[3.5]], 3)
    """

    type_name: ClassVar[str] = "dense"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.weight = empty_parameter(out_features, in_features, device=device, dtype=dtype)

    @classmethod
    def from_weight(cls, weight: Tensor, *, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Self:
        """Store a copy of a weight (out, in) and of a bias (out,), in ``dtype`` (default: that of the weight)."""
        out_features, in_features = weight.shape
        dtype = dtype or weight.dtype
        layer = cls(in_features, out_features, bias=bias is not None, device=weight.device, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """y = x W^T + b for x (..., in)."""
        return F.linear(x, self.weight, self.bias)

    def dense(self) -> Tensor:
        """W itself (out, in)."""
        return self.weight

    def flops(self, tokens: int) -> int:
        """2 tokens m n."""
        return 2 * tokens * self.out_features * self.in_features
