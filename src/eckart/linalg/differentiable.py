"""SVD and symmetric eigendecomposition with a gradient that stays finite where singular values meet.

For a = u diag(s) vᵀ and the gradients gu, gs, gv of a loss, with ∘ the entrywise product,

    ga = u [diag(gs) + F⁻ ∘ (α + β) / 2 + F⁺ ∘ (α - β) / 2] vᵀ + γ vᵀ + u δᵀ
    α = uᵀ gu - guᵀ u,   β = vᵀ gv - gvᵀ v,   F⁻_ij = 1 / (s_j - s_i),   F⁺_ij = 1 / (s_j + s_i)

and γ, δ the parts outside the kept subspaces (``_outside.outside``). The textbook has α_ij s_j + s_i β_ij times
1 / (s_j^2 - s_i^2); split as above only F⁻ is singular where singular values are equal, and there α + β is zero for
every loss that does not depend on the arbitrary choice of u and v. So F⁻ can be broadened (g / (g^2 + w^2) for 1 / g)
at no cost to them.

Reference: J. Townsend, "Differentiating the singular value decomposition", 2016; H.-J. Liao, J.-G. Liu, L. Wang and
T. Xiang, "Differentiable programming tensor networks", Phys. Rev. X 9 (2019), arXiv:1903.09650, for the broadening;
Z.-Q. Wan and S.-X. Zhang, "Automatic differentiation for complex valued SVD", 2019, arXiv:1909.02659. Different here:
the split; no discarded triplet is needed; and ``spectral``, which is exact wherever the function itself is smooth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from ._backward import PairsEigh, SpectralEigh, SpectralSVD, TripletsSVD
from ._broadening import evaluate
from .eigh import eigh
from .norms import frobenius_norm
from .svd import svd

__all__ = ["DifferentiableEigh", "DifferentiableSVD", "GradientMethod", "eigh_with_gradient", "svd_with_gradient"]

GradientMethod = Literal["auto", "full", "truncated"]

# From this size and up to this share of the triplets Lanczos and conjugate gradients are 2.5 to 10 times faster than
# LAPACK if the spectrum decays like 1 / i, and about level with it if it falls linearly.
_TRUNCATED_FROM, _TRUNCATED_SHARE = 512, 1 / 64
_LANCZOS_TOL = {torch.float32: 1e-6, torch.float64: 1e-13}


@dataclass(frozen=True)
class DifferentiableSVD:
    """Leading singular triplets through which gradients flow.

    Attributes:
        u: (..., m, k) orthonormal columns; the entry of largest magnitude in each is positive.
        s: (..., k) singular values, descending.
        vh: (..., k, n) orthonormal rows.
        error: (...,) float64, Frobenius norm of ``a - u diag(s) vh``; a constant for the gradient.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    error: Tensor
    _source: tuple[Tensor, Tensor, Tensor, Tensor, float] = field(repr=False)

    def spectral(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """u diag(f(s)) vh (..., m, n), with an exact gradient however close the singular values are.

        The gradient holds the difference quotients (f_i ∓ f_j) / (s_i ∓ s_j), which become f' where they meet
        (Daleckii and Krein). Gradients flow to tensors that f uses, too.

        Args:
            f: Differentiable function that acts on each singular value alone. ``a.spectral(torch.ones_like)`` is the
                polar factor.

        Raises:
            LinalgError: f changes the shape, or it or its derivative is NaN or infinite at a singular value.
        """
        a, u, s, vh, width = self._source
        values, slope = evaluate(f, s[..., : self.s.shape[-1]])
        result: Tensor = SpectralSVD.apply(a, values, slope, u, s, vh, width)
        return result

    def reconstruct(self) -> Tensor:
        """u diag(s) vh, (..., m, n), by ``spectral``."""
        return self.spectral(lambda s: s)


def svd_with_gradient(
    a: Tensor,
    rank: int | None = None,
    *,
    method: GradientMethod = "auto",
    broadening: float | None = None,
) -> DifferentiableSVD:
    """Singular value decomposition, thin or truncated, that can be differentiated once.

        a = u diag(s) vh + remainder        gradients as in the head of this module

    The gradient is finite for every a. It is that of the textbook where singular values are ``broadening * s_1`` apart,
    and for equal ones still exact for losses of the subspaces (u uᵀ), of the polar factor (u vh) and symmetric in s
    (the nuclear norm), provided the gap s_k > s_{k+1} is open. One class needs more than gu, gs and gv can tell:
    ``(u * f(s)) @ vh`` at equal singular values. (At s = 1, ``(u * s) @ vh`` and ``u @ vh`` send back the same gu and
    gv, and the same gs if it is zero, but their gradients differ.) For these use ``spectral`` or ``reconstruct`` of the
    result. A loss that does depend on the basis chosen among equal singular values has no gradient; what it gets is
    of size 1 / (2 broadening s_1) at most.

    Args:
        a: (..., m, n), any float dtype; half precision is computed and returned in float32.
        rank: Number k of triplets, at most min(m, n) are returned; None for all.
        method: "full": all triplets are computed (LAPACK) and kept for the gradient, O(m n min(m, n)). "truncated":
            the k leading ones by Lanczos, and conjugate gradients backward, O(m n k) a step; the steps go like
            1 / sqrt(1 - (s_{k+1} / s_k)^2). "auto": "truncated" if min(m, n) >= 512 and k <= min(m, n) / 64.
        broadening: Gap, relative to s_1, below which singular values count as equal; default eps^(2/3), which is 2e-5
            in float32 and 4e-11 in float64. Rounding of the loss's own gradient is magnified by 1 / gap, so with this
            default to eps^(1/3) at worst.

    Returns:
        The triplets, with the signs of ``svd``, and the error made.

    Raises:
        LinalgError: NaN or Inf in ``a``, not a float matrix, or no algorithm converges.
        ValueError: Unknown method, rank below 1, broadening not positive.

    Example:
        >>> import torch
        >>> a = torch.eye(3, dtype=torch.float64, requires_grad=True)  # all singular values are equal
        >>> svd_with_gradient(a).reconstruct()[0, 1].backward()
        >>> a.grad.tolist()  # torch.linalg.svd gives NaN
        [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    if method not in get_args(GradientMethod):
        raise ValueError(f"method must be one of {', '.join(get_args(GradientMethod))}, not {method!r}")
    _check_rank(rank)
    smaller = min(a.shape[-2:]) if a.ndim >= 2 else 0
    kept = smaller if rank is None else min(rank, smaller)
    if method == "auto":
        few = smaller >= _TRUNCATED_FROM and kept <= smaller * _TRUNCATED_SHARE
        method = "truncated" if few else "full"
    if method == "truncated" and kept < smaller:
        tol = _LANCZOS_TOL[torch.float64 if a.dtype == torch.float64 else torch.float32]
        u, s, vh, error = svd(a, rank, driver="lanczos", tol=tol)
    else:
        u, s, vh, _ = svd(a, driver="exact")
        error = frobenius_norm(s[..., None, kept:])
    source = a, u, s, vh, _width(broadening, s)
    u, s, vh = TripletsSVD.apply(*source, kept)
    return DifferentiableSVD(u, s, vh, error, source)


@dataclass(frozen=True)
class DifferentiableEigh:
    """Leading eigenpairs of a symmetric matrix through which gradients flow.

    Attributes:
        values: (..., k) eigenvalues, descending.
        vectors: (..., n, k) orthonormal columns; the entry of largest magnitude in each is positive.
    """

    values: Tensor
    vectors: Tensor
    _source: tuple[Tensor, Tensor, Tensor, float] = field(repr=False)

    def spectral(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """vectors diag(f(values)) vectorsᵀ (..., n, n), with an exact gradient however close the eigenvalues are.

        Args:
            f: Differentiable function that acts on each eigenvalue alone, such as ``torch.exp``.

        Raises:
            LinalgError: f changes the shape, or it or its derivative is NaN or infinite at an eigenvalue.
        """
        a, values, vectors, width = self._source
        f_values, slope = evaluate(f, values[..., : self.values.shape[-1]])
        result: Tensor = SpectralEigh.apply(a, f_values, slope, values, vectors, width)
        return result


def eigh_with_gradient(a: Tensor, rank: int | None = None, *, broadening: float | None = None) -> DifferentiableEigh:
    """Eigendecomposition of a symmetric matrix, largest eigenvalues first, that can be differentiated once.

        ga = v [diag(gw) + F ∘ (vᵀ gv - gvᵀ v) / 2] vᵀ,   F_ij = 1 / (w_j - w_i)

    F is broadened as for ``svd_with_gradient``, and what is said there of equal singular values holds here of equal
    eigenvalues: exact for losses of the subspaces and symmetric in the eigenvalues, and for v diag(f(w)) vᵀ there is
    ``spectral``. All pairs are computed and kept for the gradient, O(n^3), whatever the rank. The gradient is
    symmetric.

    Args:
        a: (..., n, n) symmetric, any float dtype; half precision is computed and returned in float32.
        rank: Number k of leading pairs; None for all n.
        broadening: Gap, relative to the largest magnitude of an eigenvalue, below which two count as equal; default
            eps^(2/3).

    Returns:
        The eigenpairs, with the signs of ``eigh``.

    Raises:
        LinalgError: Not square, not symmetric to 1 %, NaN or Inf.
        ValueError: rank below 1, broadening not positive.

    Example:
        >>> import torch
        >>> a = torch.eye(2, dtype=torch.float64, requires_grad=True)  # equal eigenvalues
        >>> eigh_with_gradient(a).spectral(torch.log)[0, 1].backward()
        >>> a.grad.tolist()
        [[0.0, 0.5], [0.5, 0.0]]
    """
    _check_rank(rank)
    values, vectors = eigh(a)
    source = a, values, vectors, _width(broadening, values)
    kept = values.shape[-1] if rank is None else min(rank, values.shape[-1])
    values, vectors = PairsEigh.apply(*source, kept)
    return DifferentiableEigh(values, vectors, source)


def _check_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}; leave it out for the full decomposition")


def _width(broadening: float | None, s: Tensor) -> float:
    if broadening is None:
        return float(torch.finfo(s.dtype).eps ** (2 / 3))
    if not 0 < broadening < float("inf"):
        raise ValueError(f"broadening must be a positive number, not {broadening}")
    return broadening
