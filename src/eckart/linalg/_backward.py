"""The autograd functions of the differentiable decompositions; their equations are in ``differentiable``.

Each takes the finished decomposition as constants beside the matrix, and returns of it what the caller wanted. It may
hold more triplets than are returned: all of them, or else ``outside`` stands in for those that are missing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._broadening import broadened, difference_quotients, magnitude, padded
from ._outside import outside

__all__ = ["PairsEigh", "SpectralEigh", "SpectralSVD", "TripletsSVD"]


class TripletsSVD(torch.autograd.Function):
    """The first ``kept`` of the triplets given; u, s and vh may hold more than those, for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, u: Tensor, s: Tensor, vh: Tensor, width: float, kept: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(a, u, s, vh)
        ctx.width = width
        return u[..., :kept].clone(), s[..., :kept].clone(), vh[..., :kept, :].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gu: Tensor, gs: Tensor, gvh: Tensor) -> tuple[Tensor | None, ...]:
        a, u, s, vh = ctx.saved_tensors
        size, top, gv = s.shape[-1], magnitude(s), gvh.mT
        alpha, beta = padded(u.mT @ gu, size), padded(vh @ gv, size)
        alpha, beta = alpha - alpha.mT, beta - beta.mT
        row, column = s[..., :, None], s[..., None, :]
        singular = broadened(alpha + beta, column - row, ctx.width, top)
        regular = broadened(alpha - beta, column + row, ctx.width, top)
        core = torch.diag_embed(padded(gs, size)) + (singular + regular) / 2
        if size < min(a.shape[-2:]):
            left, right = outside(a.to(s.dtype), u, s, vh, gu, gv, ctx.width)
        else:
            left, right = (broadened(padded(g, size), column, ctx.width, top) for g in (gu, gv))
        return _assemble(u, core, vh, left, right).to(a.dtype), None, None, None, None, None


class SpectralSVD(torch.autograd.Function):
    """u diag(f) vh for the leading triplets."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, f: Tensor, slope: Tensor, u: Tensor, s: Tensor, vh: Tensor, width: float
    ) -> Tensor:
        ctx.save_for_backward(a, f, slope, u, s, vh)
        ctx.width = width
        kept = f.shape[-1]
        return (u[..., :kept] * f[..., None, :]) @ vh[..., :kept, :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, f, slope, u, s, vh = ctx.saved_tensors
        size, top = s.shape[-1], magnitude(s)
        left, right = g @ vh.mT, g.mT @ u
        inner = u.mT @ left
        g_f = inner.diagonal(dim1=-2, dim2=-1)[..., : f.shape[-1]]
        minus = difference_quotients(f, slope, s, ctx.width, top)
        f, slope = padded(f, size), padded(slope, size)
        row, column = s[..., :, None], s[..., None, :]
        both, slopes = f[..., :, None] + f[..., None, :], (slope[..., :, None] + slope[..., None, :]) / 2
        plus = broadened(both, row + column, ctx.width, top, slopes)
        core = (minus * (inner + inner.mT) + plus * (inner - inner.mT)) / 2
        if size < min(a.shape[-2:]):
            f = f[..., None, :]
            left, right = outside(a.to(s.dtype), u, s, vh, left * f, right * f, ctx.width)
        else:
            quotient = broadened(f[..., None, :], column, ctx.width, top, slope[..., None, :])
            left, right = left * quotient, right * quotient
        return _assemble(u, core, vh, left, right).to(a.dtype), g_f, None, None, None, None, None


class PairsEigh(torch.autograd.Function):
    """The first ``kept`` of all eigenpairs."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, values: Tensor, vectors: Tensor, width: float, kept: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, values, vectors)
        ctx.width = width
        return values[..., :kept].clone(), vectors[..., :kept].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_values: Tensor, g_vectors: Tensor) -> tuple[Tensor | None, ...]:
        a, values, vectors = ctx.saved_tensors
        size, top = values.shape[-1], magnitude(values)
        skew = padded(vectors.mT @ g_vectors, size)
        skew = skew - skew.mT
        gap = values[..., None, :] - values[..., :, None]
        core = torch.diag_embed(padded(g_values, size)) + broadened(skew, gap, ctx.width, top) / 2
        return (vectors @ core @ vectors.mT).to(a.dtype), None, None, None, None


class SpectralEigh(torch.autograd.Function):
    """vectors diag(f) vectorsᵀ for the leading eigenpairs."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, f: Tensor, slope: Tensor, values: Tensor, vectors: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(a, f, slope, values, vectors)
        ctx.width = width
        leading = vectors[..., : f.shape[-1]]
        return (leading * f[..., None, :]) @ leading.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, f, slope, values, vectors = ctx.saved_tensors
        inner = vectors.mT @ g @ vectors
        g_f = inner.diagonal(dim1=-2, dim2=-1)[..., : f.shape[-1]]
        quotients = difference_quotients(f, slope, values, ctx.width, magnitude(values))
        core = quotients * (inner + inner.mT) / 2
        return (vectors @ core @ vectors.mT).to(a.dtype), g_f, None, None, None, None


def _assemble(u: Tensor, core: Tensor, vh: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """U core Vᵀ + (I - U Uᵀ) left Vᵀ + U rightᵀ (I - V Vᵀ), for left (..., m, r) and right (..., n, r)."""
    inner = core @ vh + (right - vh.mT @ (vh @ right)).mT
    return u @ inner + (left - u @ (u.mT @ left)) @ vh
