"""The part of an SVD's gradient outside the kept subspaces, by solves instead of the discarded triplets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._broadening import broadened, magnitude, positive

__all__ = ["outside"]

_CG_LIMIT = 1000


def outside(a: Tensor, u: Tensor, s: Tensor, vh: Tensor, gu: Tensor, gv: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """The gradient's components outside the kept subspaces, by solves instead of the discarded triplets.

        [ s_i I   -A_⊥ ] [γ_i]   [(I - U Uᵀ) gu_i]
        [ -A_⊥ᵀ  s_i I ] [δ_i] = [(I - V Vᵀ) gv_i],     A_⊥ = (I - U Uᵀ) A (I - V Vᵀ)

    Eliminating the longer of γ and δ leaves s_i^2 - A_⊥ᵀ A_⊥, positive definite if s_i is above what was discarded:
    conjugate gradients for all columns at once, O(m n k) a step, and steps in proportion to the root of
    1 / (1 - (s_{k+1} / s_k)^2). Directions across a gap below ``width * s_1`` (a closed one) are left alone.

    Args:
        a: (..., m, n).
        u: (..., m, k).
        s: (..., k), descending, all above the singular values left out.
        vh: (..., k, n).
        gu: (..., m, k) gradient of u.
        gv: (..., n, k) gradient of v.
        width: Of the broadening.

    Returns:
        γ (..., m, k) and δ (..., n, k).
    """
    if a.shape[-2] < a.shape[-1]:
        delta, gamma = outside(a.mT, vh.mT, s, u.mT, gv, gu, width)
        return gamma, delta
    v = vh.mT
    top = magnitude(s)
    work, t = a / top, s[..., None, :] / top

    def off(basis: Tensor, x: Tensor) -> Tensor:
        return x - basis @ (basis.mT @ x)

    def shifted(x: Tensor) -> Tensor:
        return off(v, t.square() * x - work.mT @ off(u, work @ x))

    gu, gv = off(u, gu), off(v, gv)
    delta = _conjugate_gradients(shifted, off(v, t * gv + work.mT @ gu), width * t)
    gamma = broadened(gu + off(u, work @ delta), t, width, torch.ones_like(t))
    return gamma / top, delta / top


def _conjugate_gradients(shifted: Callable[[Tensor], Tensor], rhs: Tensor, floor: Tensor) -> Tensor:
    """Solves shifted(x) = rhs for every column of (..., n, k); one whose curvature falls to its floor stops there."""

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(dim=-2, keepdim=True)

    # At unit size the squares below cannot vanish.
    size = positive(rhs.abs().amax(dim=-2, keepdim=True))
    residual = rhs / size
    x, direction, energy = torch.zeros_like(rhs), residual, dot(residual, residual)
    target = (10 * torch.finfo(rhs.dtype).eps) ** 2 * energy
    active = energy > target
    for _ in range(_CG_LIMIT):
        image = shifted(direction)
        curvature = dot(direction, image)
        active = active & (energy > target) & (curvature > floor * dot(direction, direction))
        if not bool(active.any()):
            break
        step = torch.where(active, energy / torch.where(active, curvature, 1), 0)
        x, residual = x + step * direction, residual - step * image
        last, energy = energy, dot(residual, residual)
        direction = residual + torch.where(active, energy / torch.where(active, last, 1), 0) * direction
    return x * size
