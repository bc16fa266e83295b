"""Matrices that arrive dense, as sparse tensors of torch, or as those of SciPy, which is never imported."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._prepare import all_finite
from .errors import LinalgError

__all__ = ["Compressed", "as_tensor", "compress", "energy", "multiplier", "transposed"]

_DENSE = 1 << 16  # elements up to which a sparse matrix is multiplied as a dense one, whatever its density


class Compressed(NamedTuple):
    """The columns of a sparse matrix (s, n) that are not zero.

    Attributes:
        columns: Their indices, (p,) int64, ascending.
        matrix: (s, p) float64, dense or CSR.
        adjoint: (p, s), its transpose.
        energy: Squared Frobenius norm.
    """

    columns: Tensor
    matrix: Tensor
    adjoint: Tensor
    energy: float


def as_tensor(a: Any, name: str) -> Tensor:
    """Dense tensors as they are, everything sparse as a coalesced COO tensor; detached.

    Raises:
        LinalgError: Not one real floating-point matrix, or NaN or Inf in it.
        TypeError: Neither a tensor nor a sparse matrix of SciPy.
    """
    if not isinstance(a, Tensor):
        if not hasattr(a, "tocoo"):
            raise TypeError(f"{name} must be a tensor or a sparse matrix of SciPy, not {type(a).__name__}")
        a = a.tocoo()
        index = torch.stack([torch.as_tensor(part, dtype=torch.int64) for part in (a.row, a.col)])
        a = torch.sparse_coo_tensor(index, torch.as_tensor(a.data), a.shape, check_invariants=False)
    if a.ndim != 2:
        raise LinalgError.about(name, a, "is not one matrix", "give two dimensions, rows and columns")
    if not a.is_floating_point():
        raise LinalgError.about(name, a, "is not real floating point", "convert it to float first")
    a = a.detach()
    if a.layout != torch.strided:
        a = a.to_sparse_coo().coalesce()
    if not all_finite(a if a.layout == torch.strided else a.values()):
        raise LinalgError.about(name, a, "contains NaN or Inf", "find where it comes from, or mask it")
    return a


def transposed(a: Tensor) -> Tensor:
    """Transpose of a dense or a coalesced tensor, again coalesced."""
    return a.mT if a.layout == torch.strided else a.t().coalesce()


def energy(a: Tensor) -> float:
    """Squared Frobenius norm of a dense or a coalesced tensor, in float64."""
    values = (a if a.layout == torch.strided else a.values()).to(torch.float64)
    return float(values.square().sum())


def multiplier(a: Tensor) -> Tensor:
    """The form of a dense or a coalesced tensor that multiplies dense blocks fastest."""
    if a.layout == torch.strided:
        return a
    if a.numel() <= _DENSE or a.values().numel() > a.numel() / 8:
        return a.to_dense()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return a.to_sparse_csr()


def compress(a: Tensor) -> Compressed:
    """Leaves out the zero columns of a dense or a coalesced tensor (s, n)."""
    a = a.to(torch.float64)
    if a.layout == torch.strided:
        columns = (a != 0).any(dim=0).nonzero().flatten()
        a = a[:, columns]
        return Compressed(columns, a, a.mT, energy(a))
    rows, where = a.indices()
    columns, where = where.unique(return_inverse=True)
    index, shape = torch.stack([rows, where]), (a.shape[0], columns.numel())
    a = torch.sparse_coo_tensor(index, a.values(), shape, is_coalesced=True, check_invariants=False)
    return Compressed(columns, multiplier(a), multiplier(transposed(a)), energy(a))
