"""Quotients whose denominator may vanish, for the gradients of decompositions.

A quotient x / g whose gap g may vanish, with the limit l at g = 0, is replaced by

    (x g + l w^2) / (g^2 + w^2)

(Lorentzian broadening of width w, relative to the largest singular value), which is bounded by |x| / 2w + |l|, differs
from x / g by the share w^2 / g^2 and is exact where x = l g.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._prepare import all_finite
from .errors import LinalgError

__all__ = ["broadened", "difference_quotients", "evaluate", "magnitude", "padded", "positive"]

Scalar = float | Tensor


def padded(x: Tensor, columns: int) -> Tensor:
    """x (..., k) with zeros up to that many columns."""
    return torch.nn.functional.pad(x, (0, columns - x.shape[-1]))


def positive(scale: Tensor) -> Tensor:
    """The scale, with 1 for 0."""
    return torch.where(scale > 0, scale, 1)


def magnitude(values: Tensor) -> Tensor:
    """The largest magnitude of sorted values (..., k), as (..., 1, 1); 1 if all are zero or there are none."""
    first, last = (padded(end.abs(), 1) for end in (values[..., :1], values[..., -1:]))
    return positive(torch.maximum(first, last))[..., None]


def broadened(x: Scalar, gap: Tensor, width: Scalar, scale: Tensor, limit: Scalar = 0.0) -> Tensor:
    """x / gap, with the limit ``limit`` where the gap is small next to ``width * scale``; scale > 0."""
    gap = gap / scale  # squares of the gap itself may overflow or vanish
    return (x / scale * gap + limit * width**2) / (gap.square() + width**2)


def difference_quotients(f: Tensor, slope: Tensor, s: Tensor, width: float, scale: Tensor) -> Tensor:
    """(f_i - f_j) / (s_i - s_j), the slope where s_i and s_j meet; (..., r, r).

    f and its slope (..., k) are those of the leading k of s (..., r); f is zero, by jump, at the others.

    Differences lose digits: with a width of eps^(1/3) rounding and broadening both come to eps^(2/3). Across the jump
    there is no slope, and the given width holds.
    """
    size, kept = s.shape[-1], f.shape[-1]
    leading = torch.arange(size, device=s.device) < kept
    both = leading[:, None] & leading
    f, slope = padded(f, size), padded(slope, size)
    limit = torch.where(both, (slope[..., :, None] + slope[..., None, :]) / 2, 0)
    widths = torch.where(both, torch.finfo(s.dtype).eps ** (1 / 3), width).to(s.dtype)
    gap = s[..., :, None] - s[..., None, :]
    return broadened(f[..., :, None] - f[..., None, :], gap, widths, scale, limit)


def evaluate(f: Callable[[Tensor], Tensor], values: Tensor) -> tuple[Tensor, Tensor]:
    """f(values), recorded for the gradients of f's own parameters, and the derivative f'(values).

    Raises:
        LinalgError: f changes the shape, or is NaN or infinite at one of the values.
    """
    values = values.detach()
    with torch.enable_grad():
        point = values.clone().requires_grad_()
        out = f(point)
        slope = torch.autograd.grad(out.sum(), point, allow_unused=True)[0] if out.requires_grad else None
    slope = torch.zeros_like(values) if slope is None else slope
    out = f(values)
    if out.shape != values.shape:
        raise LinalgError.about("f", out, f"changes the shape from {tuple(values.shape)}", "act on each value alone")
    if not (all_finite(out) and all_finite(slope)):
        raise LinalgError.about("f", out, "or its derivative is NaN or infinite at a value", "regularise it near 0")
    return out.to(values.dtype), slope
