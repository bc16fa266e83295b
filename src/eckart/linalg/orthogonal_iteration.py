"""A leading eigenspace by orthogonal iteration, from a start that is often good already.

    Q ← orth(C Q),   C (n, n) symmetric positive semidefinite, Q (n, k)

One product with C a step. The span of Q approaches the leading eigenspace; its columns are a basis of it and not
eigenvectors, which a Rayleigh-Ritz step at the end, the eigenvectors of Qᵀ C Q, would make of them.

Reference: Golub and Van Loan, "Matrix Computations", 4th edition (2013), section 8.2.4; Rutishauser, "Simultaneous
iteration method for symmetric matrices", Numer. Math. 16 (1970).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ._basis import orthonormalize

__all__ = ["orthogonal_iteration"]


def orthogonal_iteration(product: Callable[[Tensor], Tensor], start: Tensor, iterations: int = 1) -> Tensor:
    """Orthonormal Q (n, k) whose span is near the leading eigenspace of a symmetric matrix known by its products.

    The angle between the span and the r-th eigenvector shrinks by λ_(k+1) / λ_r each iteration. Not differentiable.

    Args:
        product: x (n, k) -> C x (n, k), in ``start``'s dtype; C is well scaled.
        start: (n, k), any matrix; its column space is what is improved.
        iterations: Products with C, at least 1.

    Raises:
        ValueError: iterations below 1.

    Example:
        >>> import torch
        >>> d = torch.tensor([[9.0], [4.0], [1.0], [0.1]])
        >>> q = orthogonal_iteration(lambda x: d * x, torch.ones(4, 2).tril(), iterations=20)
        >>> torch.allclose(q @ q.mT, torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])), atol=1e-5)
        True
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}")
    q, _ = orthonormalize(start)
    for _ in range(iterations):
        q, _ = orthonormalize(product(q))
    return q
