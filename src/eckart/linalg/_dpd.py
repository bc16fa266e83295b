"""The engine of `rsvddpd`: low-rank fits of least density power divergence. A missing entry of x is nan in here.

    minimise   s^-alpha ((1 + alpha)^-1/2 - (1 + 1/alpha) mean w),   w = exp(-alpha (x - B)² / (2 s²))   (m, n)

The divergence is concave in (x - B)², so a least-squares step with the weights w of the step before never raises it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ._prepare import squared_norm
from .solve import qr, solve_spd
from .svd import svd
from .svd_direct import Factors

__all__ = ["Fit", "divergence", "noise", "product", "spread"]

_NORMAL = 1.4826  # standard deviation of a normal law in units of its median absolute value
_SHRINK = 0.8  # s may fall by this factor a pass; faster, it is trapped in the minimum nearest to the start
# Smallest s, for data most of which is fitted exactly. The typical entry is at most 100 spreads, so this is rounding.
_FLOOR = {torch.float32: 5e-5, torch.float64: 1e-6}
_PASSES = 20  # for the s of least divergence; its error falls by half or more in each
_DAMPING = 1e-6  # of the mean weight, which is the typical size of a Gram entry
_ROUGH = 1e-4  # relative change at which starts are compared; with 1e-3 the slower of two may lose to the worse


@dataclass(frozen=True)
class Fit:
    """What is fitted, and how.

    Attributes:
        x: (..., m, n) in units of its `spread`.
        rank: Number k of pairs, at most min(m, n).
        alpha: Robustness.
        tol: Relative change of the product at which to stop.
        max_passes: When to stop in any case.
    """

    x: Tensor
    rank: int
    alpha: float
    tol: float
    max_passes: int

    def best(self, refine: bool, restarts: int, generator: torch.Generator) -> Factors:
        """The fit of lowest divergence over the starts, for each matrix of the batch."""
        models, values = [], []
        roughly = replace(self, tol=max(self.tol, _ROUGH)) if refine else self
        # Start 0, with s at the noise all along, is the one that tells whole rows or columns of outliers apart; the
        # others, with s at the spread, are far better where medians say little about the first pair.
        for number in range(0 if refine else 1, 2 + restarts):
            model = roughly.pair_by_pair(number, generator)
            models.append(roughly.refined(model, number) if refine else model)
            values.append(divergence(self.x - product(models[-1]), self.alpha)[0])
        u, s, vh = (torch.stack(part) for part in zip(*models, strict=True))
        chosen = torch.stack(values).argmin(dim=0)[None, ..., None]
        u, vh = (part.take_along_dim(chosen[..., None], 0)[0] for part in (u, vh))
        model = u, s.take_along_dim(chosen, 0)[0], vh
        return self.refined(model, 0) if refine else model

    def pair_by_pair(self, number: int, generator: torch.Generator) -> Factors:
        """The paper's estimate: one pair of singular vectors, then one of what is left, and so on."""
        x, u, s, v = self.x, self.x[..., :0], self.x[..., 0, :0], self.x.mT[..., :0]
        for _ in range(self.rank):
            left, right = self._start(x, number, generator)
            fitted = left @ right.mT
            for _ in range(self.max_passes):
                before, scale = fitted, self._scale(x - fitted, number)
                left = _without(u, left + self._regress(x - fitted, right, scale))
                fitted = left @ right.mT
                size, left = torch.linalg.vector_norm(left, dim=-2, keepdim=True), normalize(left, dim=-2)
                right = _without(v, right * size + self._regress((x - fitted).mT, left, scale))
                fitted = left @ right.mT
                size, right = torch.linalg.vector_norm(right, dim=-2, keepdim=True), normalize(right, dim=-2)
                left = left * size
                if self._settled(before, fitted):
                    break
            x = x - fitted
            u, v = torch.cat([u, normalize(left, dim=-2)], dim=-1), torch.cat([v, right], dim=-1)
            s = torch.cat([s, size.squeeze(-1)], dim=-1)
        # They are orthonormal but unsorted, and zero where nothing was left.
        (p, r), (q, t) = qr(u), qr(v)
        core = svd((r * s[..., None, :]) @ t.mT, driver="exact")
        return p @ core.u, core.s, core.vh @ q.mT

    def refined(self, model: Factors, number: int) -> Factors:
        """Alternating regressions for all pairs together, with s falling to the noise."""
        fitted = product(model)
        scale = self._scale(self.x - fitted, number)
        for _ in range(self.max_passes):
            before, old_scale, (u, s, vh) = fitted, scale, model
            scale = self._scale(self.x - fitted, 0).minimum(scale).maximum(_SHRINK * scale)
            left = u * s[..., None, :] + self._regress(self.x - fitted, vh.mT, scale)
            q, r = qr(left)
            right = vh.mT @ r.mT + self._regress((self.x - left @ vh).mT, q, scale)
            core = svd(right.mT, driver="exact")
            model = q @ core.u, core.s, core.vh
            fitted = product(model)
            if self._settled(before, fitted) and bool((scale > 0.99 * old_scale).all()):
                break
        return model

    def _start(self, x: Tensor, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Medians of the rows (..., m, 1), and in each column of the ratios to them; or zero and a random vector."""
        if number > 1:
            right = torch.randn(x.shape[-1], 1, dtype=x.dtype, device=x.device, generator=generator)
            return torch.zeros_like(x[..., :1]), normalize(right, dim=-2).expand(*x.shape[:-2], -1, -1)
        left = _median(x)[..., None]
        usable = left.abs() > (1e-3 * left.abs().amax(dim=-2, keepdim=True)).clamp(min=1e-12)
        right = _median((x / left).clamp(-1e6, 1e6).where(usable, torch.nan).mT)[..., None]
        return left * torch.linalg.vector_norm(right, dim=-2, keepdim=True), normalize(right, dim=-2)

    def _scale(self, residual: Tensor, number: int) -> Tensor:
        """The s of a start, (...,): the noise for number 0; for the others the spread, which is 1."""
        if number:
            return residual.new_ones(residual.shape[:-2])
        return noise(residual, 1).clamp(_FLOOR[residual.dtype], 1).to(residual.dtype)

    def _regress(self, residual: Tensor, basis: Tensor, scale: Tensor) -> Tensor:
        """Coefficients (..., m, k) of the rows of residual (..., m, n) on basis (..., n, k), weighted least squares."""
        weights = _weights(residual, self.alpha, scale)
        right = (weights * residual.nan_to_num()) @ basis
        gram = weights @ (basis[..., None] * basis[..., None, :]).flatten(-2)
        # Shortens the step where the columns of weight are not those of the basis; where it ends stays the same.
        damping = _DAMPING * weights.mean(dim=-1, keepdim=True)
        damping = torch.where(damping > 0, damping, 1)
        if basis.shape[-1] == 1:
            return right / (gram + damping)
        gram = gram.unflatten(-1, basis.shape[-1:] * 2) + torch.diag_embed(damping.expand_as(right))
        return solve_spd(gram.double(), right[..., None].double()).squeeze(-1).to(right.dtype)

    def _settled(self, old: Tensor, new: Tensor) -> bool:
        return bool((squared_norm(new - old) <= self.tol**2 * squared_norm(new)).all())


def spread(x: Tensor) -> Tensor:
    """Interquartile range of the entries, at least a hundredth of the typical nonzero one, and never 0; (...,)."""
    values = x.flatten(-2).sort(dim=-1).values  # nan comes last
    last = values.isfinite().sum(dim=-1, keepdim=True).clamp(min=1) - 1
    places = last * values.new_tensor([0.25, 0.75])
    low, high = (values.gather(-1, place.long()) for place in (places.floor(), places.ceil()))
    quartiles = torch.lerp(low, high, places - places.floor()).nan_to_num()
    typical = _median(values.abs().where(values != 0, torch.nan))
    size = (quartiles[..., 1] - quartiles[..., 0]).maximum(0.01 * typical)
    return torch.where(size > 0, size, 1)


def noise(residual: Tensor, alpha: float) -> Tensor:
    """Standard deviation of residuals (..., m, n), (...,) float64; by the median, but for alpha = 0 by the mean."""
    if alpha == 0:
        return (squared_norm(residual.nan_to_num()) / _count(residual)).sqrt()
    return _NORMAL * _median(residual.abs().flatten(-2)).double()


def divergence(residual: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The objective, minimised over s, and that s, (...,) float64; for alpha = 0 the negative log-likelihood."""
    least, count, s = _FLOOR[residual.dtype], _count(residual), noise(residual, alpha)
    residual = residual.double()
    for _ in range(_PASSES if alpha else 0):  # s² = sum w r² / (sum w - count alpha (1 + alpha)^-3/2), from the median
        weights = _weights(residual, alpha, s.clamp(min=least))
        square = (weights * residual.nan_to_num().square()).sum(dim=(-2, -1))
        rest = weights.sum(dim=(-2, -1)) / count - alpha * (1 + alpha) ** -1.5
        s = torch.where(rest > 0, square / count / rest, s.square()).sqrt()
    s = s.clamp(min=least)
    if alpha == 0:
        return s.log() + 0.5, s
    mean = _weights(residual, alpha, s).sum(dim=(-2, -1)) / count
    return s**-alpha * ((1 + alpha) ** -0.5 - (1 + 1 / alpha) * mean), s


def product(model: Factors) -> Tensor:
    """u diag(s) vh, (..., m, n)."""
    u, s, vh = model
    return (u * s[..., None, :]) @ vh


def _without(basis: Tensor, vector: Tensor) -> Tensor:
    return vector - basis @ (basis.mT @ vector)


def _weights(residual: Tensor, alpha: float, scale: Tensor) -> Tensor:
    """The weights w: 0 for missing entries and no others, so that a row of outliers still has a regression."""
    return (residual / scale[..., None, None]).square_().mul_(-alpha / 2).clamp_(min=-60).exp_().nan_to_num_()


def _median(values: Tensor) -> Tensor:
    """Over the last dimension, of what is there; 0 if nothing is."""
    return values.nanmedian(dim=-1).values.nan_to_num()


def _count(values: Tensor) -> Tensor:
    return values.isfinite().sum(dim=(-2, -1)).clamp(min=1)
