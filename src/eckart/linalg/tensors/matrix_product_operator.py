"""Matrix product operators: a matrix as a chain of small cores, applied without forming it.

    a[(o_1 ... o_N), (i_1 ... i_N)] ≈ G_1[:, o_1, i_1, :] ... G_N[:, o_N, i_N, :],     G_k (r_{k-1}, m_k, n_k, r_k)

The rows m = m_1 ... m_N and the columns n = n_1 ... n_N are split, the factors of one site brought together, and the
result is a tensor train over sites. Two sites are a sum of r_1 Kronecker products (`kronecker_svd`), the sites
(m, 1), (1, n) ordinary low rank, one site the matrix itself.

Reference: I. V. Oseledets, "Approximation of 2^d x 2^d matrices using tensor decomposition", SIMAX 31 (2010);
A. Novikov et al., "Tensorizing neural networks", NeurIPS 2015, arXiv:1509.06569.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import LinalgError
from ..svd import Driver
from ._tensor import Ranks, check_finite, contract_chain
from .tensor_train import TensorTrain, tensor_train

__all__ = ["MatrixProductOperator", "matrix_product_operator"]


class MatrixProductOperator(NamedTuple):
    """A matrix (m, n) as a chain of N sites.

    Attributes:
        cores: (r_{k-1}, m_k, n_k, r_k) for k = 1 ... N, with r_0 = r_N = 1 as made by `matrix_product_operator`. Where
            r_0 = r_N is larger, the two are joined: a tensor-ring matrix.
        error: () float64, Frobenius norm of the matrix minus this.
    """

    cores: tuple[Tensor, ...]
    error: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return math.prod(core.shape[1] for core in self.cores), math.prod(core.shape[2] for core in self.cores)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Bond dimensions (r_1, ..., r_{N-1})."""
        return tuple(core.shape[3] for core in self.cores[:-1])

    @property
    def parameters(self) -> int:
        """Numbers in the cores."""
        return sum(core.numel() for core in self.cores)

    def reconstruct(self) -> Tensor:
        """The matrix (m, n). Differentiable in the cores."""
        sites = contract_chain([core.flatten(1, 2) for core in self.cores])
        pairs = sites.reshape([size for core in self.cores for size in core.shape[1:3]])
        rows_first = sorted(range(pairs.ndim), key=lambda d: d % 2)
        return pairs.permute(rows_first).reshape(self.shape)

    def apply(self, x: Tensor) -> Tensor:
        """The product x aᵀ with this matrix, never formed: (..., n) -> (..., m).

        Site after site from left to right: site k turns its part n_k of x into m_k, at a cost of
        m_1 ... m_k n_k ... n_N r_{k-1} r_k multiplications a row. Differentiable in x and the cores.

        Args:
            x: (..., n), converted to the dtype of the cores.

        Raises:
            LinalgError: The last dimension of x is not n.
        """
        rows, columns = self.shape
        if x.ndim == 0 or x.shape[-1] != columns:
            raise LinalgError.about("x", x, f"does not fit a matrix of {columns} columns", "give rows of that length")
        first = self.cores[0]
        # (rows done, first bond, current bond, columns to do); the first bond is carried along for rings
        eye = torch.eye(first.shape[0], dtype=first.dtype, device=first.device)
        state = torch.einsum("tn,ab->tabn", x.reshape(-1, columns).to(first.dtype), eye)
        for core in self.cores:
            state = torch.einsum("tabnp,bmnc->tmacp", state.unflatten(3, (core.shape[2], -1)), core).flatten(0, 1)
        return state.squeeze(3).diagonal(dim1=1, dim2=2).sum(-1).reshape(*x.shape[:-1], rows)

    def round(self, ranks: Ranks | None = None, *, tol: float | None = None) -> MatrixProductOperator:
        """Lowers the ranks without forming the matrix; see `TensorTrain.round`.

        Raises:
            ValueError: The chain is a ring, which has no such algorithm; or as there.
        """
        if self.cores[0].shape[0] != 1:
            raise ValueError(f"the ends are joined by a bond of {self.cores[0].shape[0]}; only open chains are rounded")
        return _with_sites(
            TensorTrain(tuple(core.flatten(1, 2) for core in self.cores), self.error).round(ranks, tol=tol),
            [core.shape[1] for core in self.cores],
        )


def matrix_product_operator(
    a: Tensor,
    row_shape: Sequence[int],
    column_shape: Sequence[int],
    ranks: Ranks | None = None,
    *,
    tol: float | None = None,
    driver: Driver = "auto",
    generator: torch.Generator | None = None,
) -> MatrixProductOperator:
    """Matrix product operator of a matrix, by given ranks, to a given accuracy, or both.

        a (m, n)  ->  (m_1, ..., m_N, n_1, ..., n_N)  ->  (m_1 n_1, ..., m_N n_N)  ->  tensor train

    Error bounds and cost of `tensor_train`, after one copy of a. Which rows share a site is decided by their order
    (row-major), so it matters: let heads, say, be the first factor. Fewer parameters do not mean fewer operations:
    see `MatrixProductOperator.apply`. Not differentiable.

    Args:
        a: One matrix (m, n), any float dtype.
        row_shape: (m_1, ..., m_N), product m; `balanced_factors` makes one.
        column_shape: (n_1, ..., n_N), product n.
        ranks: As in `tensor_train`, one for each of the N - 1 bonds, or one number for all.
        tol: As in `tensor_train`.
        driver: As in `tensor_train`.
        generator: As in `svd`.

    Returns:
        Cores and the error.

    Raises:
        LinalgError: ``a`` is not one matrix with entries or contains NaN or Inf; shapes whose product is not its.
        ValueError: Different numbers of row and column factors; as in `tensor_train`.

    Example:
        >>> import torch
        >>> a = torch.kron(torch.kron(torch.eye(3), torch.ones(2, 4)), torch.eye(5))
        >>> result = matrix_product_operator(a, (3, 2, 5), (3, 4, 5), ranks=1)
        >>> result.parameters, a.numel(), torch.allclose(result.apply(torch.eye(60)), a.T, atol=1e-6)
        (42, 1800, True)

    Reference:
        Oseledets (2010), Novikov et al. (2015), see the module; "CompactifAI", arXiv:2401.14109, uses it for language
        models.
    """
    if a.ndim != 2:
        raise LinalgError.about("a", a, "is not one matrix", "give it two dimensions; decompose a batch one by one")
    if len(row_shape) != len(column_shape) or not row_shape:
        raise ValueError(
            f"row_shape has {len(row_shape)} factors and column_shape {len(column_shape)}; give one each for every site"
        )
    for what, size, shape in (("rows", a.shape[0], row_shape), ("columns", a.shape[1], column_shape)):
        if math.prod(shape) != size or min(shape) < 1:
            remedy = "balanced_factors(size, sites) makes a shape that fits"
            raise LinalgError.about("a", a, f"its {size} {what} are not the product of {tuple(shape)}", remedy)
    check_finite(a, "a")
    interleaved = sorted(range(2 * len(row_shape)), key=lambda d: d % len(row_shape))
    pairs = a.reshape(*row_shape, *column_shape).permute(interleaved)
    sites = pairs.reshape([m * n for m, n in zip(row_shape, column_shape, strict=True)])
    return _with_sites(tensor_train(sites, ranks, tol=tol, driver=driver, generator=generator), row_shape)


def _with_sites(train: TensorTrain, row_shape: Sequence[int]) -> MatrixProductOperator:
    """Splits the modes of a train into (m_k, n_k)."""
    cores = (core.unflatten(1, (m, -1)) for core, m in zip(train.cores, row_shape, strict=True))
    return MatrixProductOperator(tuple(cores), train.error)
