"""Products of tensors with matrices: unfoldings, mode products, Khatri-Rao. Plain differentiable functions.

    (t ×_d M)[.., j, ..] = sum over i of M[j, i] t[.., i, ..]        which is  M unfold(t, d)  in unfolded form

Reference: T. G. Kolda and B. W. Bader, "Tensor decompositions and applications", SIAM Review 51 (2009).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

__all__ = ["khatri_rao", "mode_product", "multilinear_product", "unfold"]


def unfold(t: Tensor, mode: int) -> Tensor:
    """The matrix whose rows are indexed by one mode of t, its columns by the others in their order.

        t (n_1, ..., n_N)  ->  (n_mode, product of the other sizes)

    The last index runs fastest (row-major, as in tensorly; Kolda and Bader let the first run fastest).

    Example:
        >>> import torch
        >>> unfold(torch.arange(12).reshape(2, 3, 2), 1).tolist()
        [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    """
    return t.movedim(mode, 0).reshape(t.shape[mode], -1)


def mode_product(t: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiplies every fibre of t along one mode by a matrix, t ×_mode matrix.

        t (.., n, ..), matrix (p, n)  ->  (.., p, ..)

    One matrix product on views of t, without the transpositions of an unfolding. Costs p times the size of t.

    Args:
        t: Tensor of order N >= 1.
        matrix: (p, n), of t's dtype.
        mode: Index of the dimension of size n; negative ones count from the end.

    Example:
        >>> import torch
        >>> mode_product(torch.ones(2, 3, 4), torch.ones(5, 3), 1).shape
        torch.Size([2, 5, 4])
    """
    mode %= t.ndim
    before, after = t.shape[:mode], t.shape[mode + 1 :]
    if not after:
        return t @ matrix.mT
    product = matrix @ t.reshape(math.prod(before), t.shape[mode], math.prod(after))
    return product.reshape(*before, matrix.shape[0], *after)


def multilinear_product(t: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Multiplies t by one matrix along every mode; None leaves a mode as it is.

        t ×_1 M_1 ×_2 M_2 ... ×_N M_N,   t (n_1, ..., n_N), M_d (p_d, n_d)  ->  (p_1, ..., p_N)

    Modes that shrink most come first, those that grow most last, so that the tensors in between stay small.

    Example:
        >>> import torch
        >>> multilinear_product(torch.ones(2, 3), [torch.ones(4, 2), None]).shape
        torch.Size([4, 3])
    """
    wanted = [(matrix.shape[0] / matrix.shape[1], d, matrix) for d, matrix in enumerate(matrices) if matrix is not None]
    for _, d, matrix in sorted(wanted, key=lambda entry: entry[:2]):
        t = mode_product(t, matrix, d)
    return t


def khatri_rao(matrices: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker product; row (i_1, ..., i_N), the last index running fastest, is the product of rows.

        matrices (n_d, k)  ->  (n_1 n_2 ... n_N, k)

    Example:
        >>> import torch
        >>> khatri_rao([torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6], [7, 8]])]).tolist()
        [[5, 12], [7, 16], [15, 24], [21, 32]]
    """
    result = matrices[0]
    for matrix in matrices[1:]:
        result = (result[:, None] * matrix).flatten(0, 1)
    return result
