"""Canonical polyadic decomposition: a tensor as a sum of few outer products, by alternating least squares.

    t ≈ sum over i <= k of w_i a_i ⊗ b_i ⊗ c_i ⊗ ...,     t (n_1, ..., n_N), columns a_i of A_1 (n_1, k), b_i of A_2 ...

With all factors but one fixed, the best A_d solves the normal equations  A_d H = unfold(t, d) KR,  KR the Khatri-Rao
product of the others and H the elementwise product of their Gram matrices (k, k).

Reference: T. G. Kolda and B. W. Bader, "Tensor decompositions and applications", SIAM Review 51 (2009), section 3.4;
A.-H. Phan, P. Tichavsky and A. Cichocki, "Fast alternating LS algorithms for high order CANDECOMP/PARAFAC tensor
factorizations", IEEE Trans. Signal Process. 61 (2013), for two products with t in a sweep instead of N: the modes
are split into two groups, and the factors of a group share the product with the factors of the other.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .._basis import column_signs
from .._prepare import rescale
from ..errors import LinalgError
from ._tensor import energy_of, leading_vectors, prepare_tensor, projection_error, solve_normal, stalled
from .products import khatri_rao

__all__ = ["CP", "CPInit", "cp"]

CPInit = Literal["hosvd", "random"]


class CP(NamedTuple):
    """A tensor as a sum of k outer products.

    Attributes:
        weights: (k,) descending, not negative.
        factors: One (n_d, k) for every mode, columns of norm one; in all modes but the last the entry of largest
            magnitude in each is positive.
        error: () float64, Frobenius norm of the tensor minus this sum.
    """

    weights: Tensor
    factors: tuple[Tensor, ...]
    error: Tensor

    @property
    def rank(self) -> int:
        """Number k of terms."""
        return self.weights.shape[0]

    @property
    def parameters(self) -> int:
        """Numbers in the factors; the weights can be absorbed in one."""
        return sum(factor.numel() for factor in self.factors)

    def reconstruct(self) -> Tensor:
        """The tensor (n_1, ..., n_N). Differentiable in weights and factors, so trained ones may be put in."""
        return _outer([self.factors[0] * self.weights, *self.factors[1:]])


def cp(
    t: Tensor,
    rank: int,
    *,
    init: CPInit = "hosvd",
    starts: int = 1,
    max_sweeps: int = 500,
    tol: float = 1e-6,
    generator: torch.Generator | None = None,
) -> CP:
    """Canonical polyadic decomposition of one tensor of order 3 or more.

        min over w, A_d of ||t - sum_i w_i a_i ⊗ b_i ⊗ c_i ...||_F

    Unlike the factors of a matrix, those of a CP are unique under mild conditions (Kruskal), up to order and sign.
    Alternating least squares never raise the error, but end in a stationary point that depends on the start, and
    they can be slow where components nearly cancel; several ``starts`` help. A sweep costs two products with t,
    4 k numel(t) operations. Not differentiable (the input is detached).

    Args:
        t: One tensor of order N >= 3 (not a batch), any float dtype; half precision is computed in float32. For a
            matrix use `svd`.
        rank: Number k of terms; it may exceed the sizes.
        init: "hosvd": the k leading singular vectors of every unfolding, completed by random columns where an
            unfolding has fewer; "random": Gaussian columns.
        starts: How often to start; all but the first are random. The best result is returned.
        max_sweeps: Most sweeps over the factors for each start.
        tol: A start ends when a sweep reduces its error by less than this fraction.
        generator: Source of the random columns, on t's device. None means a private one with a fixed seed, so the
            result is the same in every call.

    Returns:
        Weights, factors and the error.

    Raises:
        LinalgError: Order below 3, no entries, NaN or Inf in ``t``, not a float tensor.
        ValueError: rank, starts or max_sweeps below 1, tol not positive, unknown init.

    Example:
        >>> import torch
        >>> a, b = torch.eye(3, 2), torch.ones(4, 2).tril()
        >>> t = torch.einsum("ir,jr,kr->ijk", a, b, a)
        >>> result = cp(t, rank=2)
        >>> result.parameters, torch.allclose(result.reconstruct(), t, atol=1e-5)
        (20, True)

    Reference:
        Kolda and Bader (2009), Phan et al. (2013), see the module.
    """
    _check_options(rank, init, starts, max_sweeps, tol)
    work, scale, energy = prepare_tensor(t)
    if work.ndim < 3:
        raise LinalgError.about("t", t, "is not of order 3 or more", "use svd for a matrix")
    if generator is None:
        generator = torch.Generator(device=work.device).manual_seed(0)
    best: tuple[Tensor, list[Tensor]] | None = None
    for attempt in range(starts):
        factors = _start(work, rank, init if attempt == 0 else "random", generator)
        found = _alternate(work, factors, energy, max_sweeps, tol)
        if best is None or found[0] < best[0]:
            best = found
    assert best is not None
    error = energy_of(work - _outer(best[1])).sqrt()  # formed, for the normal equations of nearly cancelling terms err
    *units, last = best[1]
    weights = torch.linalg.vector_norm(last, dim=0)
    weights, order = weights.sort(descending=True, stable=True)
    signs = [column_signs(unit) for unit in units]
    last = _unit(last, otherwise=torch.full_like(last, len(last) ** -0.5)) * math.prod(signs)
    units = [unit * sign for unit, sign in zip(units, signs, strict=True)]
    ordered = tuple(factor[:, order] for factor in (*units, last))
    return CP(rescale(weights, scale, "weights"), ordered, error * scale)


def _check_options(rank: int, init: str, starts: int, max_sweeps: int, tol: float) -> None:
    if init not in get_args(CPInit):
        raise ValueError(f"init must be one of {', '.join(get_args(CPInit))}, not {init!r}")
    for name, value in (("rank", rank), ("starts", starts), ("max_sweeps", max_sweeps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, not {tol}")


def _start(t: Tensor, rank: int, init: CPInit, generator: torch.Generator) -> list[Tensor]:
    """One (n_d, rank) with columns of norm one for every mode."""
    factors = []
    for d, n in enumerate(t.shape):
        columns = leading_vectors(t, d, rank)[0] if init == "hosvd" else t.new_empty(n, 0)
        fill = torch.randn(n, rank - columns.shape[1], dtype=t.dtype, device=t.device, generator=generator)
        factors.append(torch.cat([columns, fill / torch.linalg.vector_norm(fill, dim=0)], dim=1))
    return factors


def _alternate(
    t: Tensor, factors: list[Tensor], energy: Tensor, max_sweeps: int, tol: float
) -> tuple[Tensor, list[Tensor]]:
    """Sweeps until they stall: the squared error, and factors with unit columns but for the last, with the weights.

    The modes are split into two groups of about the same size; t is a matrix from one to the other.
    """
    shape = t.shape
    cut = min(range(1, t.ndim), key=lambda d: math.prod(shape[:d]) + math.prod(shape[d:]))
    matrix = t.reshape(math.prod(shape[:cut]), -1)
    modes = range(t.ndim)
    groups = ((matrix, modes[:cut], modes[cut:]), (matrix.mT, modes[cut:], modes[:cut]))
    floor = (10 * torch.finfo(t.dtype).eps) ** 2 * energy
    units, grams = list(factors), [_gram(factor) for factor in factors]
    best = energy, factors
    for _ in range(max_sweeps):
        for side, group, others in groups:
            image = side @ khatri_rao([units[d] for d in others])
            image = image.reshape(*(shape[d] for d in group), -1)
            for d in group:
                rhs = _contract(image, {e - group[0]: units[e] for e in group if e != d})
                hadamard = torch.stack([grams[e] for e in modes if e != d]).prod(dim=0)
                solution = solve_normal(hadamard, rhs.mT).mT
                units[d] = _unit(solution, otherwise=units[d])
                grams[d] = _gram(units[d])
        now = [*units[:-1], solution]
        kept = (rhs.to(torch.float64) * solution.to(torch.float64)).sum()
        missed = projection_error(t, energy, kept, partial(_outer, now)).square()
        before, best = best[0], (missed, now) if missed <= best[0] else best
        if stalled(before, missed, tol, floor):
            break
    return best


def _contract(image: Tensor, factors: dict[int, Tensor]) -> Tensor:
    """Sums image (n_a, n_b, ..., k) over all modes in ``factors``, weighted by their columns: (n, k) is left."""
    for d, factor in sorted(factors.items(), reverse=True):  # from behind, so that the places before stay
        image = (image * factor.reshape(-1, *[1] * (image.ndim - d - 2), factor.shape[1])).sum(dim=d)
    return image


def _unit(columns: Tensor, otherwise: Tensor) -> Tensor:
    """Columns divided by their norms; zero columns taken from ``otherwise``."""
    norms = torch.linalg.vector_norm(columns, dim=0)
    return torch.where(norms > 0, columns / torch.where(norms > 0, norms, 1), otherwise)


def _gram(factor: Tensor) -> Tensor:
    wide = factor.to(torch.float64)
    return wide.mT @ wide


def _outer(factors: list[Tensor]) -> Tensor:
    """Sum of the outer products of columns: a product of the Khatri-Rao products of two halves of the modes."""
    half = (len(factors) + 1) // 2
    product = khatri_rao(factors[:half]) @ khatri_rao(factors[half:]).mT
    return product.reshape([factor.shape[0] for factor in factors])
