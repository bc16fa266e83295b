"""How much of what a head writes enters a later head: composition scores from thin factors.

The mathematics of `eckart.analysis.talking_heads`, which says where it comes from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import SVD, qr, svd

__all__ = ["component_scores", "noise_floor", "ov_components", "reader", "whole_score"]


def ov_components(value: Tensor, output: Tensor) -> SVD:
    """Singular value decomposition of what a head moves from one token to another, through its thin factors.

        O V = Q_O (R_O R_V^T) Q_V^T,   SVD of the small matrix (w, w)

    Args:
        value: V (..., w, d).
        output: O (..., d, w).

    Returns:
        ``u`` (..., d, w) are the directions v_i that it writes, ``vh`` (..., w, d) those it reads.

    Example:
        >>> found = ov_components(torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([[3.0], [0.0], [0.0]]))
        >>> found.s.tolist(), found.u.flatten().abs().tolist(), found.vh.flatten().abs().tolist()
        ([6.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    """
    write, read = qr(output), qr(value.mT)
    inner = svd(write.r @ read.r.mT, driver="exact")
    return SVD(write.q @ inner.u, inner.s, inner.vh @ read.q.mT, inner.error)


def reader(left: Tensor, right: Tensor | None = None) -> Tensor:
    """The thin matrix whose product with a direction is as long as that of M = left^T right.

    Args:
        left: A (..., h, d), what the direction meets first.
        right: B (..., h, d); without it M = A^T, what enters the head at all.

    Returns:
        R A (..., h, d).

    Example:
        >>> reader(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[5., 0.]])
    """
    return left if right is None else qr(right.mT).r @ left


def component_scores(written: Tensor, read: Tensor) -> Tensor:
    """CS_i of written directions against readers.

    Args:
        written: (c, d) unit vectors.
        read: (r, h, d) of :func:`reader`.

    Returns:
        (r, c), between 0 and 1; 0 for a reader that is zero.

    Example:
        >>> component_scores(torch.eye(2), torch.tensor([[[0.6, 0.0], [0.0, 0.8]]]))
        tensor([[0.6000, 0.8000]])
    """
    lengths = (read @ written.mT).norm(dim=-2)
    size = torch.linalg.matrix_norm(read)[:, None]
    return torch.where(size > 0, lengths / torch.where(size > 0, size, 1), 0).clamp(max=1)


def whole_score(s: Tensor, scores: Tensor) -> Tensor:
    """The score of whole heads: the root mean square of those of their components, weighted by s^2.

    Args:
        s: (..., w) singular values.
        scores: (r, ..., w).

    Returns:
        (r, ...).

    Example:
        >>> whole_score(torch.tensor([2.0, 0.0]), torch.tensor([[0.5, 1.0]]))
        tensor([0.5000])
    """
    energy = s.square()
    total = energy.sum(dim=-1)
    mean = (energy * scores.square()).sum(dim=-1) / torch.where(total > 0, total, 1)
    return mean.sqrt()


def noise_floor(read: Tensor, dimensions: int) -> Tensor:
    """Standard deviation of CS^2 over random directions, whose mean is 1 / dimensions.

    Args:
        read: (..., h, d) of :func:`reader`.
        dimensions: in which directions are random: d, or d - 1 without that of all ones.

    Returns:
        (...).

    Example:
        >>> noise_floor(torch.tensor([[1.0, 0.0]]), 2)  # CS = |cos| of a random angle
        tensor(0.3536)
    """
    gram = read @ read.mT
    energy = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    share = gram.square().sum(dim=(-2, -1)) / torch.where(energy > 0, energy, 1).square()
    return ((share - 1 / dimensions).clamp(min=0) * 2 / (dimensions * (dimensions + 2))).sqrt()
