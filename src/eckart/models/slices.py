"""Some rows or columns of a linear map as a linear map of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..structures import Dense
from .select import LinearRef

__all__ = ["columns_of", "rows_of_linear"]


def rows_of_linear(ref: LinearRef, rows: Sequence[int] | torch.Tensor) -> Dense:
    """The linear map that makes these outputs only: W[rows] (k, in) and b[rows].

    Example:
        >>> layer = torch.nn.Linear(2, 3)
        >>> rows_of_linear(LinearRef("", layer, "linear"), [2, 0]).dense().equal(layer.weight[[2, 0]])
        True
    """
    index = torch.as_tensor(rows, device=ref.weight.device)
    bias = None if ref.bias is None else ref.bias.detach()[index]
    return Dense.from_weight(ref.weight.detach()[index], bias=bias)


def columns_of(ref: LinearRef, columns: Sequence[int] | torch.Tensor) -> Dense:
    """The linear map that reads these inputs only: W[:, columns] (out, k), with the whole bias.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> columns_of(LinearRef("", layer, "linear"), [1]).dense().equal(layer.weight[:, [1]])
        True
    """
    index = torch.as_tensor(columns, device=ref.weight.device)
    return Dense.from_weight(ref.weight.detach()[:, index], bias=None if ref.bias is None else ref.bias.detach())
