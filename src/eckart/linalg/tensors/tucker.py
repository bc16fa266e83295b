"""Tucker decomposition: a small core times one orthonormal factor along every mode.

    t ≈ core ×_1 U_1 ×_2 U_2 ... ×_N U_N,     t (n_1, ..., n_N), core (r_1, ..., r_N), U_d (n_d, r_d)

The core is t ×_1 U_1ᵀ ... ×_N U_Nᵀ, so the approximation is an orthogonal projection of t.

Reference: L. De Lathauwer, B. De Moor and J. Vandewalle, "A multilinear singular value decomposition" and "On the best
rank-1 and rank-(R1, R2, ..., RN) approximation of higher-order tensors", SIMAX 21 (2000), for "hosvd" and "hooi";
N. Vannieuwenhoven, R. Vandebril and K. Meerbergen, "A new truncation strategy for the higher-order singular value
decomposition", SISC 34 (2012), for "sthosvd".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .._prepare import rescale
from ..svd import Driver
from ._tensor import Ranks, as_list, energy_of, leading_vectors, prepare_tensor, projection_error, stalled
from .products import mode_product, multilinear_product

__all__ = ["Tucker", "TuckerMethod", "tucker"]

Find = Callable[[Tensor, int, int], Tensor]  # leading left singular vectors of an unfolding: tensor, mode, rank
TuckerMethod = Literal["sthosvd", "hosvd", "hooi"]


class Tucker(NamedTuple):
    """A tensor in Tucker form.

    Attributes:
        core: (r_1, ..., r_N).
        factors: One (n_d, r_d) with orthonormal columns for every mode.
        error: () float64, Frobenius norm of the tensor minus this.
    """

    core: Tensor
    factors: tuple[Tensor, ...]
    error: Tensor

    @property
    def ranks(self) -> tuple[int, ...]:
        """(r_1, ..., r_N)."""
        return tuple(self.core.shape)

    @property
    def parameters(self) -> int:
        """Numbers in the core and the factors."""
        return self.core.numel() + sum(factor.numel() for factor in self.factors)

    def reconstruct(self) -> Tensor:
        """The tensor (n_1, ..., n_N). Differentiable in core and factors, so trained ones may be put in."""
        return multilinear_product(self.core, self.factors)


def tucker(
    t: Tensor,
    ranks: Ranks,
    *,
    method: TuckerMethod = "sthosvd",
    tol: float = 1e-4,
    max_sweeps: int = 50,
    driver: Driver = "auto",
    generator: torch.Generator | None = None,
) -> Tucker:
    """Tucker decomposition of one tensor of any order.

        ||t - core ×_1 U_1 ... ×_N U_N||_F <= sqrt(N) * (error of the best Tucker approximation of these ranks)

    With the most expensive step, the Gram matrix of the first mode, the default costs about numel(t) * (n + r)
    multiplications, and every further mode sees a tensor that is smaller by r / n. The bound holds for all three
    methods (for unfoldings of 256 rows and more, which `svd` may sample, up to 1 %); in practice the error is within
    a few per cent of the best. For a matrix it is the truncated SVD, with the singular values on the diagonal of the
    core. Not differentiable (the input is detached).

    Args:
        t: One tensor of order N >= 1 (not a batch), any float dtype; half precision is computed in float32.
        ranks: r_d for every mode, or one number for all; cut to what the unfolding of that mode can have. A mode of
            full rank is left alone: its factor is the identity.
        method: "sthosvd": the leading singular vectors of mode after mode, smallest mode first, each of the tensor as
            truncated so far. "hosvd": those of t itself, for every mode; slower, but the factors of a lower rank are
            the first columns of those of a higher one. "hooi": starts from the better of the two and makes each
            mode in turn the best for the others, so that it is never worse; several times slower, usually for a few
            per cent of the error.
        tol: "hooi" ends when a sweep reduces the error by less than this fraction.
        max_sweeps: Most sweeps of "hooi" over all modes.
        driver: How singular vectors are found, as in `svd`. "auto" takes the Gram matrix, in float64, for unfoldings
            of less than 256 rows in single precision.
        generator: As in `svd`.

    Returns:
        Core, factors and the error.

    Raises:
        LinalgError: No entries, NaN or Inf in ``t``, not a float tensor.
        ValueError: A rank below 1 or a wrong number of them, unknown method, tol or max_sweeps not positive.

    Example:
        >>> import torch
        >>> t = torch.einsum("i,j,k->ijk", torch.ones(4), torch.arange(3.0), torch.ones(2))
        >>> result = tucker(t, ranks=1)
        >>> result.core.shape, result.parameters, torch.allclose(result.reconstruct(), t, atol=1e-6)
        (torch.Size([1, 1, 1]), 10, True)

    Reference:
        De Lathauwer et al. (2000), Vannieuwenhoven et al. (2012), see the module.
    """
    if method not in get_args(TuckerMethod):
        raise ValueError(f"method must be one of {', '.join(get_args(TuckerMethod))}, not {method!r}")
    if not tol > 0 or max_sweeps < 1:
        raise ValueError(f"tol and max_sweeps must be positive, not {tol} and {max_sweeps}")
    work, scale, energy = prepare_tensor(t)
    wanted = as_list(ranks, work.ndim, "mode")

    def find(x: Tensor, d: int, rank: int) -> Tensor:
        return leading_vectors(x, d, rank, driver=driver, generator=generator)[0]

    if method == "hooi":
        starts = [_truncate(work, wanted, find, sequential) for sequential in (True, False)]
        core, bases = max(starts, key=lambda start: float(energy_of(start[0])))
        core, bases = _improve(work, core, bases, find, energy, tol, max_sweeps)
    else:
        core, bases = _truncate(work, wanted, find, sequential=method == "sthosvd")
    factors = tuple(
        bases[d] if d in bases else torch.eye(n, dtype=work.dtype, device=work.device) for d, n in enumerate(work.shape)
    )
    error = projection_error(work, energy, energy_of(core), lambda: multilinear_product(core, factors))
    return Tucker(rescale(core, scale, "core"), factors, error * scale)


def _truncate(t: Tensor, ranks: list[int], find: Find, sequential: bool) -> tuple[Tensor, dict[int, Tensor]]:
    """Core and bases of the modes that are not of full rank, one mode after the other or all from t itself."""
    bases: dict[int, Tensor] = {}
    core = t
    for d in sorted((d for d, n in enumerate(t.shape) if ranks[d] < n), key=lambda d: t.shape[d]):
        bases[d] = find(core, d, ranks[d])
        if sequential:
            core = mode_product(core, bases[d].mT, d)
    return core if sequential else _project(t, bases), bases


def _project(t: Tensor, bases: dict[int, Tensor]) -> Tensor:
    return multilinear_product(t, [bases[d].mT if d in bases else None for d in range(t.ndim)])


def _improve(
    t: Tensor, core: Tensor, bases: dict[int, Tensor], find: Find, energy: Tensor, tol: float, max_sweeps: int
) -> tuple[Tensor, dict[int, Tensor]]:
    """Sweeps over the modes; the energy of the core, that is what the projection keeps, never falls."""
    kept = energy_of(core)
    for _ in range(max_sweeps if bases else 0):
        new = dict(bases)
        for d in bases:
            others = _project(t, {e: basis for e, basis in new.items() if e != d})
            new[d] = find(others, d, core.shape[d])
        new_core = mode_product(others, new[d].mT, d)
        new_kept = energy_of(new_core)
        done = stalled(energy - kept, energy - new_kept, tol, floor=4 * torch.finfo(t.dtype).eps * energy)
        if new_kept > kept:
            core, bases, kept = new_core, new, new_kept
        if done:
            break
    return core, bases
