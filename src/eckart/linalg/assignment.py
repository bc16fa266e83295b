"""The linear assignment problem: which row goes with which column."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import LinalgError

__all__ = ["assignment"]


def assignment(score: Tensor) -> Tensor:
    """The one-to-one assignment of columns to rows with the largest total score.

        max over permutations p of  sum_i score[i, p_i]

    By the shortest augmenting paths of Jonker and Volgenant, in scipy; O(n^3), exact.

    Args:
        score: (n, n), any real dtype; worked on in float64 on the CPU.

    Returns:
        p (n,) int64 on the device of ``score``: the column of each row.

    Raises:
        LinalgError: not square, or NaN or Inf in it.
        ImportError: scipy is missing.

    Example:
        >>> assignment(torch.tensor([[1.0, 5.0], [2.0, 7.0]])).tolist()  # 1 + 7 is more than 5 + 2
        [0, 1]

    Reference:
        D. F. Crouse, On implementing 2D rectangular assignment algorithms, IEEE Trans. Aerospace and Electronic
        Systems 52 (2016), which is what scipy implements.
    """
    if score.ndim != 2 or score.shape[0] != score.shape[1]:
        raise LinalgError(f"an assignment needs a square matrix of scores, got {tuple(score.shape)}")
    matrix = score.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise LinalgError(f"scores {tuple(score.shape)} hold NaN or Inf: check what they were made of")
    try:
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("an assignment of hidden units needs scipy: pip install scipy") from error
    _, columns = linear_sum_assignment(matrix.numpy(), maximize=True)
    return torch.as_tensor(columns, dtype=torch.int64, device=score.device)
