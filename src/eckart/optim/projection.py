"""The subspace that a gradient is projected on: finding it, improving it, changing to another.

R = A Q,   A (a, b) = G or Gᵀ, Q (b, r) with Qᵀ Q = I, near the leading right singular vectors of A
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..linalg import eigh, orthogonal_iteration, svd
from .moments import State, load, store
from .sharding import left_product, right_product, whole, whole_norm

__all__ = ["carry_moments", "exact_basis", "improved_basis", "inverse_norm", "reconstruction_error", "scaled_gram"]

_OVERSAMPLING = 16  # random directions tried beside the basis that is there
_DENSE_FROM = 0.5  # share of the directions from which the Gram matrix is decomposed instead


def improved_basis(
    a: Tensor, start: Tensor | None, rank: int, generator: torch.Generator, *, iterations: int = 1
) -> tuple[Tensor, Tensor]:
    """Q (b, r) near the leading right singular vectors of A, and R = A Q, at about the cost of a further projection.

    Orthogonal iteration on Aᵀ A from the basis that is there, with 16 random directions beside it, so that what the
    basis has not seen can enter; the Gram matrix of the product turns the result into approximate singular vectors.
    Where r is half of b or more the Gram matrix of A is decomposed.

    Args:
        a: A (a, b).
        start: (b, r), or None for none, which costs an iteration more.
        rank: r < b.
        generator: Source of the random directions, on A's device.
        iterations: Products with Aᵀ A.
    """
    size, gram = a.shape[1], scaled_gram(a)
    width = rank + _OVERSAMPLING
    if width >= _DENSE_FROM * size:
        q = eigh(gram(torch.eye(size, dtype=a.dtype, device=a.device)), rank).vectors
        return q, right_product(a, q)
    columns = width if start is None else _OVERSAMPLING
    fresh = torch.randn(size, columns, generator=generator, dtype=a.dtype, device=a.device) / size**0.5
    block = fresh if start is None else torch.cat([start.to(a.dtype), fresh], dim=1)
    q = orthogonal_iteration(gram, block, iterations + (start is None))
    low = right_product(a, q)
    unit = low * inverse_norm(a)
    turn = eigh(left_product(unit, unit), rank).vectors
    return q @ turn, right_product(low, turn)


def exact_basis(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Q (b, r), the leading right singular vectors of A by a full decomposition, and R = A Q; gathers a sharded A."""
    q = svd(whole(a), rank, driver="exact").vh.mT.contiguous()
    return q, right_product(a, q)


def inverse_norm(a: Tensor) -> Tensor:
    """1 / ‖A‖_F, the same in every process; 0 for zeros."""
    norm = whole_norm(a)
    return torch.where(norm > torch.finfo(norm.dtype).tiny, norm.reciprocal(), 0.0)


def scaled_gram(a: Tensor) -> Callable[[Tensor], Tensor]:
    """x ↦ Aᵀ A x / ‖A‖², (b, k) plain and the same in every process, for A (a, b)."""
    inverse = inverse_norm(a)
    return lambda x: left_product(a, right_product(a, x * inverse) * inverse)


def reconstruction_error(a: Tensor, basis: Tensor, low: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ε(Q) = ‖A − A Q Qᵀ‖² / ‖A‖², the loss of online PCA, and its gradient (b, r), for any Q.

        ∇ε = (2 S Qᵀ Q + 2 Q Rᵀ R − 4 S) / ‖A‖²,   R = A Q, S = Aᵀ R

    Costs the product S and, unless it is given, R; no other matrix of A's size is formed. The error of zeros is 0.

    Args:
        a: A (a, b).
        basis: Q (b, r).
        low: R (a, r), if it is known.
    """
    inverse = inverse_norm(a)
    low = (right_product(a, basis) if low is None else low) * inverse
    cross, inner, gram = left_product(a, low) * inverse, left_product(low, low), basis.mT @ basis
    error = (inverse > 0).to(a.dtype) - 2 * inner.trace() + (inner * gram).sum()
    return error.clamp(min=0), 2 * (cross @ gram + basis @ inner) - 4 * cross


def carry_moments(state: State, old: Tensor, new: Tensor) -> None:
    """Express moments kept in one basis in another: M ← M (Qᵀ Q'), V ← (√V (Qᵀ Q'))∘².

    Args:
        state: With "first" and "second" (a, r).
        old: Q (b, r).
        new: Q' (b, r).
    """
    turn = old.mT.to(new.dtype) @ new
    if "first" in state:
        store(state, "first", right_product(load(state, "first", new.dtype), turn))
    if "second" in state:
        store(state, "second", right_product(load(state, "second", new.dtype).sqrt(), turn).square())
