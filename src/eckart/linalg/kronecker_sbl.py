"""Sparse Bayesian learning of a vector whose support is a Kronecker product.

    y = (A_1 ⊗ ... ⊗ A_F) x + noise,   A_f (M_f, N_f),   x (N,),   N = prod N_f,   y (M,),   M = prod M_f
    x ~ N(0, diag(g_1 ⊗ ... ⊗ g_F)),   noise ~ N(0, s I),   with the g_f (N_f,) >= 0 that make y most likely

Most entries of those g are zero, so only the support of x has to be a product, not x. Y. He and G. Joseph, "Bayesian
Algorithms for Kronecker-structured Sparse Vector Recovery With Application to IRS-MIMO Channel Estimation" (KroSBL),
2023, arXiv:2307.14719; code: YanbinHe/JournalKroSBL. The g are found by expectation maximisation, as there. What
differs: no Kronecker product is ever formed, since with the singular value decompositions of A_f diag(g_f)^1/2 the
expectation step is a few products along the modes of tensors with M and N entries (the code forms N x N); there may be
any number of factors, one being the classic method; y and the A_f are scaled first, so that units do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .contract import MatrixMethod
from .errors import LinalgError
from .svd import svd

__all__ = ["KroneckerSBL", "SparsePosterior", "SparseSolver", "kronecker_posterior", "kronecker_sbl"]

SparseSolver = Literal["svd", "am"]

_PRUNE = {"svd": 1e-3, "am": 1e-2}  # the paper's code, noise known
_PRUNE_UNKNOWN_NOISE = 5e-4  # the same, noise estimated
_INNER, _INNER_TOL = 100, 1e-5  # passes of one alternating minimisation, and when it is done
_LEAST = 1e-12  # of the largest hyperparameter, or of the mean square of y: they are divided by


class SparsePosterior(NamedTuple):
    """A sparse vector, given what was measured.

    Attributes:
        x: (N,) posterior mean; ``x.view(N_1, ..., N_F)`` is the tensor.
        variance: (N,) float64 posterior variances.
        hyperparameters: The g_f (N_f,) float64, whose Kronecker product is the prior variance of x; 0 where pruned.
        noise: Variance of one entry of the noise, as given or as estimated.
        error: ``||y - (A_1 ⊗ ... ⊗ A_F) x||``.
        iterations: Steps of expectation maximisation.
    """

    x: Tensor
    variance: Tensor
    hyperparameters: tuple[Tensor, ...]
    noise: float
    error: float
    iterations: int


def kronecker_sbl(
    y: Tensor,
    dictionaries: Sequence[Tensor],
    *,
    noise: float | None = None,
    solver: SparseSolver = "svd",
    prune: float | None = None,
    tol: float = 1e-4,
    max_iterations: int = 150,
) -> SparsePosterior:
    """Recovers x (N,) with a Kronecker-structured support from fewer measurements y (M,).

        y = (A_1 ⊗ ... ⊗ A_F) x + noise

    Every step computes the posterior of x for the present g, takes L = variance + |mean|² as a tensor
    (N_1, ..., N_F), and replaces g by a Kronecker product near L. With M_f <= N_f a step costs O(N sum M_f), and
    O(N N_1) more for "svd"; all in double precision. Not differentiable, not batched.

    Args:
        y: M measurements, of shape (M,) or (M_1, ..., M_F), real or complex.
        dictionaries: The A_f (M_f, N_f), one or more, real or complex; the first changes slowest, as in torch.kron.
        noise: Variance of an entry of the noise (E|.|² if complex), in the units of y squared; less than 1e-12 of
            the mean square of y counts as that. None: estimated along with g, starting at a tenth of that mean square.
        solver: How g is taken from L. "svd": the nearest Kronecker product, by successive rank-one decompositions;
            three to ten times faster and as accurate or more, but the likelihood may fall. "am": alternating
            minimisation of ``sum log g + L / g``, with which it never does.
        prune: Drop index i of factor f when g_f[i] is below this fraction of the largest; 0 for never. Default:
            the paper's, 1e-3 for "svd", 1e-2 for "am", 5e-4 with unknown noise. Entries of x that are weaker than the
            strongest by the root of this may be lost.
        tol: Stop when g changes by less than this, relative; 1e-4 in the paper.
        max_iterations: Stop in any case; 150 in the paper.

    Returns:
        The posterior at the last g, in double precision if any input is, else in single.

    Raises:
        LinalgError: Shapes that do not fit, not float or complex, NaN or Inf, a dictionary that is zero.
        ValueError: Unknown solver, noise or tol not positive, prune outside [0, 1), max_iterations below 1, no
            dictionary.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> a, b = (torch.randn(6, 10, generator=generator) for _ in range(2))
        >>> x = torch.zeros(10, 10)
        >>> x[2, 7], x[5, 7] = 3.0, -2.0
        >>> result = kronecker_sbl((a @ x @ b.T).flatten(), [a, b], noise=1e-6)  # 36 measurements of 100 unknowns
        >>> torch.allclose(result.x.view(10, 10), x, atol=1e-2)
        True

    Reference:
        He and Joseph, arXiv:2307.14719.
    """
    _check_options(noise, solver, prune, tol, max_iterations)
    work, columns, dtype = _checked(y, dictionaries)
    if prune is None:
        prune = _PRUNE[solver] if noise is not None else _PRUNE_UNKNOWN_NOISE
    # In these units y and, on average, the columns have a mean square and a length of 1, so g = 1 is a fair start.
    unit, units = _root_mean_square(work) or 1.0, [_root_mean_square(a) * math.sqrt(a.shape[0]) for a in columns]
    work, columns = work / unit, [a / size for a, size in zip(columns, units, strict=True)]
    s = 0.1 if noise is None else max(_LEAST, noise / unit / unit)
    sizes = [a.shape[1] for a in columns]
    g = [torch.ones(size, dtype=torch.float64, device=work.device) for size in sizes]
    kept = [torch.arange(size, device=work.device) for size in sizes]
    iterations, change = 0, math.inf
    while change >= tol and iterations < max_iterations:
        iterations += 1
        mean, variance = kronecker_posterior(work, columns, g, s)
        second, before = variance + mean.abs().square(), _outer(g)
        g = _nearest_kronecker(second) if solver == "svd" else _alternate(second, g)
        g = [part.clamp(min=_LEAST * float(part.max())) for part in g]
        if noise is None:
            misfit = float((work - _along_modes(columns, mean)).abs().square().sum())
            s = max(_LEAST, (misfit + s * float((1 - variance / before).sum())) / work.numel())
        change = float(torch.linalg.vector_norm(_outer(g) - before) / torch.linalg.vector_norm(before))
        strong = [part >= prune * part.max() for part in g]
        g = [part[keep] for part, keep in zip(g, strong, strict=True)]
        kept = [part[keep] for part, keep in zip(kept, strong, strict=True)]
        columns = [a[:, keep] for a, keep in zip(columns, strong, strict=True)]
    mean, variance = kronecker_posterior(work, columns, g, s)
    error = float(torch.linalg.vector_norm(work - _along_modes(columns, mean))) * unit
    back = unit / math.prod(units)
    g[-1] = g[-1] * back**2
    x, variance = (_scattered(part, kept, sizes).flatten() for part in (mean * back, variance * back**2))
    x, g = x.to(dtype), [_scattered(part, [place], [size]) for part, place, size in zip(g, kept, sizes, strict=True)]
    if not bool((x.isfinite() & variance.isfinite()).all()):
        raise LinalgError.about("x", x, "overflows this dtype", "scale y or the dictionaries")
    return SparsePosterior(x, variance, tuple(g), s * unit**2 if noise is None else noise, error, iterations)


def kronecker_posterior(
    y: Tensor, dictionaries: Sequence[Tensor], hyperparameters: Sequence[Tensor], noise: float
) -> tuple[Tensor, Tensor]:
    """Mean and variances of x, given y and its prior variances g_1 ⊗ ... ⊗ g_F.

        mean = W ((U_1 ⊗ ... ⊗ U_F)^H y / (s + p)),   variance = g - |W|² (1 / (s + p))
        A_f diag(g_f)^1/2 = U_f diag(p_f)^1/2 V_f^H,   W = ⊗ diag(g_f)^1/2 V_f diag(p_f)^1/2,   p = p_1 ⊗ ... ⊗ p_F

    Args:
        y: (M_1, ..., M_F) float64 or complex128.
        dictionaries: A_f (M_f, N_f), of the same dtype.
        hyperparameters: g_f (N_f,) float64, nonnegative.
        noise: s, positive.

    Returns:
        mean (N_1, ..., N_F), variance (N_1, ..., N_F) float64.

    Example:
        >>> import torch
        >>> y, one, eye = torch.tensor([4.0, 0.0]).double(), torch.ones(2).double(), torch.eye(2).double()
        >>> mean, variance = kronecker_posterior(y, [eye], [one], noise=1.0)
        >>> mean.tolist(), variance.tolist()
        ([2.0, 0.0], [0.5, 0.5])
    """
    left, power, weights = [], [], []
    for a, g in zip(dictionaries, hyperparameters, strict=True):
        u, root, vh = torch.linalg.svd(a * g.sqrt(), full_matrices=False)  # `svd` is for real matrices
        left.append(u.mH)
        power.append(root.square())
        weights.append(g.sqrt()[:, None] * vh.mH * root)
    total = noise + _outer(power)
    mean = _along_modes(weights, _along_modes(left, y) / total)
    explained = _along_modes([w.abs().square() for w in weights], 1 / total)
    return mean, (_outer(hyperparameters) - explained).clamp(min=0)


def _nearest_kronecker(tensor: Tensor) -> list[Tensor]:
    """Nonnegative vectors whose Kronecker product is near a nonnegative tensor: one rank-one fit for each mode."""
    factors, rest = [], tensor
    while rest.ndim > 1:
        u, s, vh, _ = svd(rest.flatten(1), rank=1, driver="exact")
        factors.append(u[:, 0].abs())
        rest = (s[0] * vh[0].abs()).view(rest.shape[1:])
    return [*factors, rest]


def _alternate(second: Tensor, g: Sequence[Tensor]) -> list[Tensor]:
    """Minimise ``sum log g + second / g`` over one factor of g at a time, in turn."""
    g = list(g)
    for _ in range(_INNER):
        before = _outer(g)
        for f in range(len(g)):
            means = second
            for other in reversed(range(len(g))):
                if other != f:
                    means = torch.tensordot(means, 1 / g[other] / g[other].numel(), dims=([other], [0]))
            g[f] = means.clamp(min=_LEAST * float(means.max()))
        for f in range(len(g) - 1):
            length = torch.linalg.vector_norm(g[f])
            g[f], g[-1] = g[f] / length, g[-1] * length
        if bool(torch.linalg.vector_norm(_outer(g) - before) < _INNER_TOL * torch.linalg.vector_norm(before)):
            break
    return g


def _outer(vectors: Sequence[Tensor]) -> Tensor:
    return reduce(lambda product, vector: product[..., None] * vector, vectors)


def _along_modes(matrices: Sequence[Tensor], tensor: Tensor) -> Tensor:
    """(matrices[0] ⊗ ... ⊗ matrices[-1]) tensor.flatten(), as a tensor."""
    for mode, matrix in enumerate(matrices):
        tensor = torch.tensordot(matrix, tensor, dims=([1], [mode])).movedim(0, mode)
    return tensor


def _scattered(values: Tensor, kept: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    full = values.new_zeros(tuple(sizes))
    full[torch.meshgrid(*kept, indexing="ij")] = values
    return full


def _root_mean_square(a: Tensor) -> float:
    largest = float(a.abs().max())
    return largest * math.sqrt(float((a / largest).abs().square().mean())) if largest else 0.0


def _checked(y: Tensor, dictionaries: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], torch.dtype]:
    """y as a tensor (M_1, ..., M_F) and the dictionaries, in double precision; the dtype of the result."""
    if not dictionaries:
        raise ValueError("dictionaries must hold at least one matrix")
    for name, a in (("y", y), *((f"dictionaries[{f}]", a) for f, a in enumerate(dictionaries))):
        if not (a.is_floating_point() or a.is_complex()):
            raise LinalgError.about(name, a, "is neither float nor complex", "convert it with .float() first")
        if not bool(a.isfinite().all()):
            raise LinalgError.about(name, a, "contains NaN or Inf", "find where it comes from, or mask it")
        if a is not y and (a.ndim != 2 or not bool(a.any())):
            raise LinalgError.about(name, a, "is not a matrix with nonzero entries", "give one (M_f, N_f) a factor")
    shape = tuple(a.shape[0] for a in dictionaries)
    if y.shape not in (shape, (math.prod(shape),)):
        raise LinalgError.about("y", y, f"does not fit dictionaries with {shape} rows", "give their product of entries")
    tensors = (y, *dictionaries)
    work = torch.complex128 if any(t.is_complex() for t in tensors) else torch.float64
    double = any(t.dtype in (torch.float64, torch.complex128) for t in tensors)
    dtype = work if double else (torch.complex64 if work.is_complex else torch.float32)
    return y.detach().to(work).reshape(shape), [a.detach().to(work) for a in dictionaries], dtype


def _check_options(noise: float | None, solver: str, prune: float | None, tol: float, max_iterations: int) -> None:
    if solver not in get_args(SparseSolver):
        raise ValueError(f"solver must be one of {', '.join(get_args(SparseSolver))}, not {solver!r}")
    if noise is not None and not noise > 0:
        raise ValueError(f"noise must be a positive variance, not {noise}; leave it out to have it estimated")
    if prune is not None and not 0 <= prune < 1:
        raise ValueError(f"prune must lie in [0, 1), not {prune}; 0 drops nothing")
    if not tol > 0:
        raise ValueError(f"tol must be positive, not {tol}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, not {max_iterations}")


@dataclass(frozen=True)
class KroneckerSBL(MatrixMethod):
    """`kronecker_sbl` with its options.

    Attributes:
        solver: "svd", or "am" for alternating minimisation.
        prune: Fraction of the largest hyperparameter below which one is dropped; None for the paper's.
        tol: Relative change of the hyperparameters at which to stop; 1e-4 in the paper.
        max_iterations: Stop in any case; 150 in the paper.

    Example:
        >>> import torch
        >>> KroneckerSBL()(torch.tensor([9.0, 0.0, 0.0, 0.0]), [torch.eye(2), torch.eye(2)], noise=1e-6).x
        tensor([9., 0., 0., 0.])
    """

    solver: SparseSolver = "svd"
    prune: float | None = None
    tol: float = 1e-4
    max_iterations: int = 150

    def __post_init__(self) -> None:
        _check_options(None, self.solver, self.prune, self.tol, self.max_iterations)

    def __call__(self, y: Tensor, dictionaries: Sequence[Tensor], *, noise: float | None = None) -> SparsePosterior:
        """Sparse x with y = (A_1 ⊗ ... ⊗ A_F) x + noise."""
        return kronecker_sbl(y, dictionaries, noise=noise, **asdict(self))
