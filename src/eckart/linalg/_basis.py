"""Orthonormal bases: making one, extending one, and the error of a projection onto one."""

from __future__ import annotations

import torch
from torch import Tensor

from ._prepare import squared_norm

__all__ = ["column_signs", "extend", "orthonormalize", "posterior_error"]

# Least squared distance of a unit column from the span of those before it that Cholesky-QR may be given: what rounding
# leaves of orthogonality after one pass must be mended by a second.
_DEPENDENT = {torch.float32: 1e-4, torch.float64: 1e-10}


def orthonormalize(y: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """y = q r with qᵀ q = I, for one tall y (m, k), whatever its rank.

    Cholesky-QR on the k x k Gram of the normalised columns: three matrix products, several times faster than
    Householder QR on a CPU. It loses orthogonality like ``eps / lambda_min``; where that is more than the dtype's own
    rounding it is repeated (Cholesky-QR2). Columns too dependent for float32 are treated in float64, and those too
    dependent for float64 by Householder QR, which also completes missing directions.

    Args:
        y: (m, k), m >= k.
        dtype: Of q, whose rounding sets how orthonormal it must be; y's own by default.

    Returns:
        q (m, k) in ``dtype``, r (k, k) float64.

    Reference: Yamamoto, Nakatsukasa, Yanagisawa and Fukaya, "Roundoff error analysis of the CholeskyQR2
    algorithm", ETNA 44 (2015).
    """
    dtype = dtype or y.dtype
    for work in (y.dtype, torch.float64):
        found = _cholesky_qr(y.to(work), torch.finfo(dtype).eps)
        if found is not None:
            return found[0].to(dtype), found[1]
    q, r = torch.linalg.qr(y.to(torch.float64))
    return q.to(dtype), r


def _cholesky_qr(q: Tensor, wanted: float) -> tuple[Tensor, Tensor] | None:
    """q with columns orthonormal to ``wanted``, and r in float64; None if they are too dependent for q's dtype."""
    eps = torch.finfo(q.dtype).eps
    r: Tensor | None = None
    for _ in range(2):
        gram = (q.mT @ q).to(torch.float64)
        norms = gram.diagonal().sqrt()
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        lower, info = torch.linalg.cholesky_ex(gram / norms / norms[:, None])
        smallest = float(lower.diagonal().min()) ** 2 if len(lower) else 1.0
        if int(info) != 0 or not smallest > _DEPENDENT[q.dtype]:
            return None
        step = lower.mT * norms
        # The inverse of a factor so well conditioned is accurate, and multiplying by it takes a third of the time of a
        # triangular solve with m right-hand sides.
        inverse = torch.linalg.solve_triangular(
            step, torch.eye(len(step), dtype=step.dtype, device=step.device), upper=True
        )
        q = q @ inverse.to(q.dtype)
        r = step if r is None else step @ r
        if smallest > 0.5 or eps / smallest < 0.1 * wanted:
            break
    assert r is not None
    return q, r


def extend(basis: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Splits ``new = basis @ coupling + fresh @ growth`` so that ``[basis fresh]`` is orthonormal.

    Gram-Schmidt by blocks, twice: once is not enough in floating point when ``new`` lies almost in the span.

    Args:
        basis: (m, p), orthonormal columns.
        new: (m, b), with p + b <= m.

    Returns:
        coupling (p, b) float64, fresh (m, b), growth (b, b) float64.
    """
    if basis.shape[1] == 0:
        fresh, growth = orthonormalize(new)
        return growth.new_empty(0, new.shape[1]), fresh, growth
    part = basis.mT @ new
    fresh, growth = orthonormalize(new - basis @ part)
    coupling = part.to(torch.float64)
    for _ in range(2):
        again = basis.mT @ fresh
        fresh = fresh - basis @ again
        coupling = coupling + again.to(torch.float64) @ growth
        # Removing a component of size e changes the inner products of `fresh` by e**2.
        if float(again.abs().max()) <= torch.finfo(new.dtype).eps ** 0.5:
            return coupling, fresh, growth
        fresh, step = orthonormalize(fresh)
        growth = step @ growth
    # What is new has fewer directions than columns. Householder QR of both completes it outside the basis.
    rank = basis.shape[1]
    q, r = torch.linalg.qr(torch.cat([basis, new], dim=1).to(torch.float64))
    coupling = torch.linalg.solve_triangular(r[:rank, :rank], r[:rank, rank:], upper=True)
    return coupling, q[:, rank:].to(new.dtype), r[rank:, rank:]


def column_signs(u: Tensor) -> Tensor:
    """Signs (..., 1, k) that make the entry of largest magnitude of each column of u (..., m, k) positive."""
    if u.numel() == 0:
        return u.new_ones(*u.shape[:-2], 1, u.shape[-1])
    largest = u.gather(-2, u.abs().argmax(dim=-2, keepdim=True))
    return torch.where(largest < 0, -torch.ones_like(largest), torch.ones_like(largest))


def posterior_error(a: Tensor, energy: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
    """Frobenius norm of ``a - u s vh`` in float64, for u s vh a projection of a onto span(u) or span(vh).

    Then ``||a - u s vh||^2 = ||a||^2 - ||s||^2`` exactly, which needs no product with a. The difference carries
    an absolute error of a few eps * ||a||^2, so where it is smaller than 2000 of those the residual is formed.

    Args:
        a: (..., m, n).
        energy: ||a||^2, (...,) float64.
        u: (..., m, k).
        s: (..., k).
        vh: (..., k, n).
    """
    left = energy - s.to(torch.float64).square().sum(dim=-1)
    if bool((left > 2000 * torch.finfo(a.dtype).eps * energy).all()):
        return left.sqrt()
    rows = max(1, (1 << 20) // max(1, a.numel() // max(1, a.shape[-2])))
    scaled = u * s[..., None, :]
    parts = zip(a.split(rows, dim=-2), scaled.split(rows, dim=-2), strict=True)
    return torch.stack([squared_norm(x - y @ vh) for x, y in parts]).sum(dim=0).sqrt()
