"""Lyapunov equations and inverses of batches of positive definite matrices, without eigendecompositions.

    y z + z y = g,   y (b, n, n) symmetric positive definite, g and z (b, n, n) symmetric

Temporaries are reused where they can be: for matrices of the usual size, the time that the system takes to hand out
fresh memory would be a third of the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._prepare import all_finite

__all__ = ["add_to_diagonal", "conjugate_gradients", "invert", "newton_schulz", "norm", "symmetrized", "trace"]

_LIMIT = 1000  # steps, against rounding on a singular matrix; 100 do for a condition number of 1e6
_LEAF = 32  # size from which a batched product is cheaper than LAPACK, which takes one matrix at a time


def add_to_diagonal(a: Tensor, value: Tensor | float) -> Tensor:
    """a + value * I, in place; value is a number or (b, 1)."""
    a.diagonal(dim1=-2, dim2=-1).add_(value)
    return a


def symmetrized(a: Tensor) -> Tensor:
    """(a + aᵀ) / 2."""
    return (a + a.mT).mul_(0.5)


def trace(a: Tensor) -> Tensor:
    """Traces (b, 1, 1)."""
    return a.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[:, None, None]


def norm(a: Tensor) -> Tensor:
    """Frobenius norms (b, 1, 1)."""
    return torch.linalg.matrix_norm(a, keepdim=True)


def invert(a: Tensor) -> Tensor:
    """Inverses of positive definite matrices; not finite where they are not."""
    factor = _inverse_factor(a)
    return factor.mT @ factor


def _inverse_factor(a: Tensor) -> Tensor:
    """L^-1 for a = L Lᵀ, block by block."""
    k = a.shape[-1] // 2
    if k < _LEAF:
        lower, info = torch.linalg.cholesky_ex(a)
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        inverse = torch.linalg.solve_triangular(lower, eye.expand_as(a), upper=False)
        return inverse.masked_fill_((info > 0)[:, None, None], torch.nan)
    result = torch.zeros_like(a)
    first, off = _inverse_factor(a[:, :k, :k]), a[:, :k, k:]
    across = first @ off
    second = _inverse_factor(torch.baddbmm(a[:, k:, k:], across.mT, across, alpha=-1))
    result[:, :k, :k], result[:, k:, k:] = first, second
    result[:, k:, :k] = (second @ across.mT).neg_() @ first
    return result


def newton_schulz(y: Tensor, y_inverse: Tensor | None, g: Tensor, steps: int | None) -> tuple[Tensor, bool]:
    """Solves by the matrix sign iteration of Newton and Schulz; ``y_inverse`` is not used.

    [[y, g], [0, -y]] = [[b, c], [0, -b]] is taken to its sign [[I, 2 z], [0, -I]]. All the way c = b z + z b, so the
    relative error of c / 2 is that of b. 5 products a step; small eigenvalues grow by 3 / 2 a step.

    Args:
        y: Positive definite (b, n, n).
        y_inverse: Its inverse, if it is known.
        g: Symmetric (b, n, n).
        steps: Number of steps; None until the error is below eps^(1/2).

    Returns:
        z, and whether that error was reached.
    """
    scale = norm(y @ y).sqrt()  # above the largest eigenvalue; the root of ||a||_F for y = a^(1/2), as in the paper
    b, c = y / scale, g / scale
    enough = torch.finfo(y.dtype).eps ** 0.25  # of I - b^2, before a step that squares it
    for _ in range(_LIMIT if steps is None else steps):
        square, product = b @ b, b @ c
        half = torch.baddbmm(product @ b, b, product, beta=-0.5)
        c = 1.5 * c - symmetrized(half)
        b = torch.baddbmm(b, b, square, beta=1.5, alpha=-0.5)
        if steps is None and bool((norm(add_to_diagonal(square, -1.0)) <= enough).all()):
            return c / 2, True
    return c / 2, steps is not None


def conjugate_gradients(y: Tensor, y_inverse: Tensor | None, g: Tensor, steps: int | None) -> tuple[Tensor, bool]:
    """Solves by conjugate gradients, in a well-conditioned form.

    The equation, plus m^2 times y^-1 (the equation) y^-1, is

        b z + z b = g + m^2 y^-1 g y^-1,   b = y + m^2 y^-1

    For m in the middle of the spectrum, the condition number of b is half the root of that of y. One product a step.

    Args:
        y: Positive definite (b, n, n).
        y_inverse: Its inverse, if it is known.
        g: Symmetric (b, n, n).
        steps: Number of steps; None until the residual is below eps^(1/2) of the right-hand side.

    Returns:
        z, and whether that residual was reached.
    """
    y_inverse = invert(y) if y_inverse is None else y_inverse
    if not all_finite(y_inverse):
        return g, False
    m2 = trace(y) / trace(y_inverse)
    b = torch.addcmul(y, m2, y_inverse)
    residual = symmetrized((y_inverse @ g @ y_inverse).mul_(m2).add_(g))
    z, direction = torch.zeros_like(g), residual.clone()
    square, tiny = _dot(residual, residual), torch.finfo(g.dtype).tiny
    enough = square * torch.finfo(g.dtype).eps
    for _ in range(_LIMIT if steps is None else steps):
        image = b @ direction
        image = image + image.mT
        length = square / _dot(direction, image).clamp(min=tiny)
        z.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        before, square = square, _dot(residual, residual)
        if steps is None and bool((square <= enough).all()):
            return z, True
        direction.mul_(square / before.clamp(min=tiny)).add_(residual)
    return z, steps is not None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))[:, None, None]
