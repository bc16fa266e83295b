"""Differentiable square roots and inverse square roots of batches of covariances, from matrix products.

    y = a^(1/2)  or  y = a^(-1/2),   a (..., n, n) symmetric positive semidefinite

Forward, with a scaled by c, the diagonal Padé approximant of the square root:

    (a / c)^(1/2) ≈ Q^-1 P,   P = Σ_j C(11, 2j) (a / c)^j,   Q = Σ_j C(11, 2j + 1) (a / c)^j,   j = 0 ... 5

Backward, with G = ∂l/∂y, a Lyapunov equation, which unlike an eigendecomposition has no trouble with equal eigenvalues:

    y Z + Z y = G,   ∂l/∂a = Z

Yue Song, Nicu Sebe and Wei Wang, "Fast Differentiable Matrix Square Root", ICLR 2022, arXiv:2201.08663, and "Fast
Differentiable Matrix Square Root and Inverse Square Root", arXiv:2201.12543; code
https://github.com/KingJamesSong/FastDifferentiableMatSqrt.

The paper's method is ``normalization="frobenius", polish=0, backward="newton-schulz", backward_steps=8``. The defaults
depart from it for accuracy. Q^-1 P has a relative error of

    2 t^11 / (1 - t^11),   t = (1 - s) / (1 + s),   s = (l / c)^(1/2)

at the eigenvalue l: largest at both ends of the spectrum, so c belongs in its middle, while ||a||_F lies beyond its
upper end. Here c = ||a||_F^2 / tr a, a mean of the eigenvalues. Newton-Schulz steps follow, which also tell the error,
and an eigendecomposition of the rare matrix on which they do not settle. They give y^-1 as well, and with it the
Lyapunov equation is so well conditioned that conjugate gradients need few steps. P and Q are the paper's polynomials
in I - a / c, expanded around zero: all their coefficients are positive, so nothing cancels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._lyapunov import add_to_diagonal, conjugate_gradients, invert, newton_schulz, norm, symmetrized, trace
from ._prepare import all_finite, prepare, result_dtype
from .contract import MatrixMethod
from .eigh import eigh, symmetric_part
from .errors import LinalgError
from .whiten import NEGATIVE

__all__ = ["MatrixSqrt", "matrix_sqrt"]

Method = Literal["pade", "taylor", "newton", "eigh"]
Normalization = Literal["tight", "frobenius"]
Backward = Literal["conjugate-gradients", "newton-schulz"]

_PADE = [float(math.comb(11, 2 * j)) for j in range(6)]  # of P; those of Q are the same in reverse
_POLISH = {"pade": 6, "taylor": 12, "newton": 40}  # steps after which an eigendecomposition is the cheaper way


@dataclass(frozen=True)
class MatrixSqrt(MatrixMethod):
    """The options of `matrix_sqrt`, which describes them in full.

    Attributes:
        inverse: Whether a^(-1/2) is wanted.
        method: "pade" (MPA [5/5]), "taylor" (MTP, degree 10), "newton" (coupled Newton-Schulz) or "eigh" (exact).
        normalization: "tight", or "frobenius" as in the paper.
        polish: Newton-Schulz steps after the approximation; None for as many as needed, 0 as in the paper.
        backward: "conjugate-gradients", or "newton-schulz" as in the paper.
        backward_steps: Steps of the backward iteration; None for as many as needed, 8 as in the paper.
        ridge: Added to the diagonal, in units of its mean.
    """

    inverse: bool = False
    method: Method = "pade"
    normalization: Normalization = "tight"
    polish: int | None = None
    backward: Backward = "conjugate-gradients"
    backward_steps: int | None = None
    ridge: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in (("method", Method), ("normalization", Normalization), ("backward", Backward)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, not {getattr(self, name)!r}")
        least = 1 if self.method == "newton" else 0
        if self.polish is not None and self.polish < least:
            raise ValueError(f"polish must be at least {least}, not {self.polish}; leave it out for as many as needed")
        if self.backward_steps is not None and self.backward_steps < 1:
            raise ValueError(f"backward_steps must be at least 1, not {self.backward_steps}; leave it out to adapt")
        if not 0 <= self.ridge < float("inf"):
            raise ValueError(f"ridge must be a number of at least 0, not {self.ridge}")

    def __call__(self, a: Tensor) -> Tensor:
        """The root of a (..., n, n); see `matrix_sqrt`."""
        if a.numel() == 0:
            prepare(a, square=True)  # raises what there is to raise
            return a.to(result_dtype(a))
        with torch.autocast(a.device.type, enabled=False):
            root: Tensor = _Root.apply(a, self)
        return root


def matrix_sqrt(
    a: Tensor,
    *,
    inverse: bool = False,
    method: Method = "pade",
    normalization: Normalization = "tight",
    polish: int | None = None,
    backward: Backward = "conjugate-gradients",
    backward_steps: int | None = None,
    ridge: float = 0.0,
) -> Tensor:
    """Differentiable square root, or inverse square root, of positive semidefinite matrices.

        y y = a   or   y a y = I,   a and y (..., n, n) symmetric

    The defaults cost 8 matrix products and an inversion forward and 4 to 8 products backward for a well-conditioned
    covariance, O(n^3) each, whole batches at a time. Relative error, of root and gradient: below eps^(1/2) of the
    dtype, in the root as a rule a small multiple of eps. Where the Newton-Schulz steps do not settle, which is from a
    condition number of about 1e4, an eigendecomposition takes over. Differentiable once, in the symmetric part of a.
    The gradient is that of the exact root; with ``polish=0`` that is not quite the derivative of what is returned.

    Args:
        a: Symmetric positive semidefinite (..., n, n), any float dtype.
        inverse: Whether to return a^(-1/2) instead.
        method: "pade": diagonal Padé approximant [5/5]. "taylor": Taylor polynomial of degree 10, free of inversions
            but far less accurate. "newton": coupled Newton-Schulz iteration. "eigh": eigendecomposition, the best
            choice for a few matrices on a CPU.
        normalization: What a is divided by. "tight": ||a||_F^2 / tr a for "pade"; for the others, which need all
            eigenvalues below 1, ||a a||_F^(1/2). "frobenius": ||a||_F, as in the paper.
        polish: Coupled Newton-Schulz steps after the approximation, 3 products each. None: until ||I - a^(-1/2)
            a^(1/2)||_F leaves an error of eps, and at least one. 0: the approximation alone, unchecked, as in the
            paper. For "newton" these steps are the method.
        backward: How the Lyapunov equation is solved: by "conjugate-gradients", one product a step, or "newton-schulz",
            the matrix sign iteration of the paper, 5 products a step. The method "eigh" has its own formula.
        backward_steps: Number of its steps. None: until the error is below eps^(1/2). The paper takes 8.
        ridge: Added to the diagonal, in units of its mean.

    Returns:
        The root (..., n, n), symmetric, in float64 for float64 input and float32 otherwise.

    Raises:
        LinalgError: Not square, symmetric and positive semidefinite; NaN or Inf; singular, for the inverse or in the
            backward pass (the derivative is infinite); NaN or Inf in the incoming gradient.
        ValueError: Unknown option, negative number of steps or ridge.

    Example:
        >>> import torch
        >>> a = torch.tensor([[5.0, 4.0], [4.0, 5.0]], requires_grad=True)
        >>> y = matrix_sqrt(a)
        >>> torch.allclose(y, torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        True
        >>> y.trace().backward()
        >>> torch.allclose(a.grad, matrix_sqrt(a, inverse=True) / 2)  # tr a^(1/2) has the gradient a^(-1/2) / 2
        True

    Reference:
        Song, Sebe and Wang, arXiv:2201.08663 and arXiv:2201.12543.
    """
    return MatrixSqrt(inverse, method, normalization, polish, backward, backward_steps, ridge)(a)


class _Root(torch.autograd.Function):
    """Forward and backward pass. Saved are, of the scaled matrices, the root and its inverse, or the eigenpairs."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, options: MatrixSqrt) -> Tensor:
        work, scale, _ = prepare(a, square=True)
        work = _shifted(symmetric_part(work, "a").reshape(-1, *a.shape[-2:]), options.ridge)
        if options.method == "eigh":
            root, *pairs = _exact(work, options.inverse, a)
            ctx.save_for_backward(*pairs)
        else:
            root, other = _approximate(work, options, a)
            ctx.save_for_backward(root, other)
        ctx.options, ctx.dtype, ctx.scale = options, a.dtype, scale.reshape(-1, 1, 1)
        return (root * (ctx.scale ** (-0.5 if options.inverse else 0.5)).to(root.dtype)).reshape(a.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        options, (first, second) = ctx.options, ctx.saved_tensors
        g, scale, _ = prepare(gradient, "gradient", dtype=first.dtype)
        with torch.autocast(g.device.type, enabled=False):
            g = symmetrized(g.reshape(-1, *g.shape[-2:]))
            if options.method == "eigh":
                z, settled = _exact_gradient(first, second, g, options.inverse)
            else:
                if options.inverse:  # y y = a^-1, and the derivative of a^-1
                    square = first @ first
                    g = -(square @ g @ square)
                solve = newton_schulz if options.backward == "newton-schulz" else conjugate_gradients
                z, settled = solve(first, second, g, options.backward_steps)
        if not settled:
            raise LinalgError.about("a", gradient, "is singular, where its root has no derivative", "give a ridge")
        z = _shifted(z, options.ridge)  # adding the ridge is a symmetric operation, so it is its own derivative
        scale = scale.reshape(-1, 1, 1) * ctx.scale ** (-1.5 if options.inverse else -0.5)
        z = z.mul_(scale.to(z.dtype))
        if not all_finite(z):
            raise LinalgError.about("gradient", gradient, "overflows this dtype", "scale the loss down")
        return z.reshape(gradient.shape).to(ctx.dtype), None


def _shifted(a: Tensor, ridge: float) -> Tensor:
    """a + ridge * mean(diag a) * I."""
    return a if ridge == 0 else add_to_diagonal(a.clone(), ridge / a.shape[-1] * trace(a)[..., 0])


def _exact(a: Tensor, inverse: bool, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The root, the square roots (b, n) of the eigenvalues and the eigenvectors; errors are about ``given``."""
    values, vectors = eigh(a)
    if bool((values[:, -1] < -NEGATIVE * values[:, 0].abs()).any()):
        raise LinalgError.about("a", given, "is not positive semidefinite", "give a Gram matrix such as x.T @ x")
    if inverse and bool((values <= a.shape[-1] * torch.finfo(a.dtype).eps * values[:, :1]).any()):
        raise LinalgError.about("a", given, "is singular to working precision", "give a ridge, such as ridge=1e-4")
    root = values.clamp(min=0).sqrt()
    return symmetrized((vectors * (1 / root if inverse else root)[:, None]) @ vectors.mT), root, vectors


def _exact_gradient(root: Tensor, vectors: Tensor, g: Tensor, inverse: bool) -> tuple[Tensor, bool]:
    """Q [(Qᵀ g Q) / (r_i + r_j)] Qᵀ, and the same over -r_i r_j for the inverse root; and whether that exists."""
    rows, columns = root[:, :, None], root[:, None]
    divisor = -(rows + columns) * rows * columns if inverse else rows + columns
    return symmetrized(vectors @ (vectors.mT @ g @ vectors / divisor) @ vectors.mT), bool((divisor != 0).all())


def _approximate(a: Tensor, options: MatrixSqrt, given: Tensor) -> tuple[Tensor, Tensor | None]:
    """The root, and its inverse where that is a by-product, by iteration except where that does not settle."""
    c = _normalization(a, options)
    scaled, start = a / c, _START[options.method]
    factor = c.rsqrt() if options.inverse else c.sqrt()
    if options.polish == 0:
        root, other, settled = start(scaled, options.inverse), None, torch.ones_like(c, dtype=torch.bool)
    else:
        other = start(scaled, True)
        pair = (other, scaled @ other) if options.inverse else (scaled @ other, other)
        root, other, settled = _polish(*pair, options.polish, _POLISH[options.method])
        other = other / factor
    root = symmetrized(root).mul_(factor)
    settled = (settled & norm(root).isfinite()).flatten()
    if not bool(settled.all()):
        root[~settled], other = _exact(a[~settled], options.inverse, given)[0], None
    return root, other


def _normalization(a: Tensor, options: MatrixSqrt) -> Tensor:
    """c (b, 1, 1): at least a mean eigenvalue, and at least the largest one except for the Padé approximant."""
    c = norm(a)
    if options.normalization == "tight":
        if options.method == "pade":
            c = torch.minimum(c, c * (c / trace(a).clamp(min=torch.finfo(a.dtype).tiny)))
        else:
            c = c * norm((a / c) @ (a / c)).sqrt()
    return torch.where(c > 0, c, torch.ones_like(c))


def _pade(a: Tensor, inverse: bool) -> Tensor:
    """Q^-1 P, or P^-1 Q for the inverse root."""
    square = a @ a
    cube = square @ a

    def polynomial(c: list[float]) -> Tensor:
        low, high = (add_to_diagonal((c[i + 1] * a).add_(square, alpha=c[i + 2]), c[i]) for i in (0, 3))
        return low.baddbmm_(cube, high)

    numerator, denominator = polynomial(_PADE), polynomial(_PADE[::-1])
    if inverse:
        numerator, denominator = denominator, numerator
    return invert(denominator) @ numerator


def _taylor(a: Tensor, inverse: bool) -> Tensor:
    """Σ_i t_i (I - a)^i up to degree 10, by Horner's rule; t_i are those of (1 - x)^(1/2) or of (1 - x)^(-1/2)."""
    coefficients = [1.0]
    for i in range(10):
        coefficients.append(coefficients[-1] * (i + (0.5 if inverse else -0.5)) / (i + 1))
    x = add_to_diagonal(-a, 1.0)
    value = add_to_diagonal(coefficients.pop() * x, coefficients.pop())
    while coefficients:
        value = add_to_diagonal(value @ x, coefficients.pop())
    return value


_START = {"pade": _pade, "taylor": _taylor, "newton": lambda a, inverse: add_to_diagonal(torch.zeros_like(a), 1.0)}


def _polish(wanted: Tensor, other: Tensor, steps: int | None, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coupled Newton-Schulz iteration: wanted and other go to a^(1/2) and a^(-1/2), or the other way round.

    With the gap I - other @ wanted a step leaves an error of 3/8 gap^2. Returns wanted, other without the last step,
    and which matrices (b, 1, 1) settled; for a given number of steps, all.
    """
    settled = torch.ones_like(wanted[:, :1, :1], dtype=torch.bool)
    for _ in range(limit if steps is None else steps):
        gap = add_to_diagonal((other @ wanted).neg_(), 1.0)
        wanted = torch.baddbmm(wanted, wanted, gap, alpha=0.5)
        if steps is None:
            settled = norm(gap) <= 2 * torch.finfo(wanted.dtype).eps ** 0.5
            if bool(settled.all()):
                break
        other = torch.baddbmm(other, gap, other, alpha=0.5)
    return wanted, other, settled
