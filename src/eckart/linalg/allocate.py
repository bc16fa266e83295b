"""One parameter budget over many matrices: which rank each of them gets.

    sum of cost(rank_i) <= (1 - ratio) * sum m_i n_i

cost(k) counts the numbers of the factored form; a matrix whose rank reaches break-even is dense and costs m n.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ._counts import Form, break_even_rank, check_form, check_ratio, num_parameters, rank_for_parameters
from ._threshold import best_ranks

__all__ = ["Matrix", "Policy", "allocate"]

Policy = Literal["uniform", "threshold", "svd-llm-v2", "welore"]


@dataclass(frozen=True)
class Matrix:
    """A matrix that takes part in an allocation.

    Attributes:
        name: Unique name.
        shape: (m, n).
        spectrum: (min(m, n),) singular values in any order, of the matrix or of its whitened version; every policy
            but "uniform" needs them, on one scale for all matrices if the policy is "threshold".
        group: Matrices of one kind (say, all query projections) for "svd-llm-v2", which shares within a group.
    """

    name: str
    shape: tuple[int, int]
    spectrum: Tensor | None = field(default=None, repr=False)
    group: str = ""


def allocate(
    matrices: Sequence[Matrix],
    ratio: float,
    *,
    policy: Policy = "uniform",
    form: Form = "pivoted",
    minimum: int = 1,
    maximum: int | None = None,
    dense_from: float = 1.0,
) -> dict[str, int]:
    """Shares one budget: the ranks that together remove at least ``ratio`` of all parameters.

        sum of cost(rank_i) <= (1 - ratio) * sum m_i n_i,     minimum <= rank_i <= min(m_i, n_i)

    Args:
        matrices: What to share over.
        ratio: Fraction of the parameters REMOVED, in (0, 1).
        policy: "uniform": the same ratio for every matrix. "threshold": the most kept energy for the budget, that is a
            global threshold on s_i^2 per parameter of one more rank (``_threshold.best_ranks``). "svd-llm-v2":
            removal within each group proportional to 1 / log(loss), see ``_svd_llm_v2``. "welore": a global threshold
            on singular values normalised to [0, 1] by each matrix's own smallest and largest.
        form: What a rank costs, see ``num_parameters``.
        minimum: Smallest rank, at least 1.
        maximum: Largest rank, at least ``minimum``; None for none. A matrix that wants more is cut to it, and is dense
            only where that would store no less.
        dense_from: A matrix that would keep this fraction of its ranks, or more, stays dense instead and pays for it.

    Returns:
        Rank by name; min(m, n) means dense.

    Raises:
        ValueError: ratio outside (0, 1), an option out of range, unknown policy or form, a name twice, a spectrum that
            is missing or does not fit, or a budget below the smallest ranks (the message names the largest feasible
            ratio).

    Example:
        >>> import torch
        >>> flat, steep = torch.ones(8), 2.0 ** -torch.arange(8.0)
        >>> matrices = [Matrix("flat", (8, 8), flat), Matrix("steep", (8, 8), steep)]
        >>> allocate(matrices, 0.3, policy="uniform"), allocate(matrices, 0.3, policy="threshold")
        ({'flat': 3, 'steep': 3}, {'flat': 8, 'steep': 1})

    Reference:
        Wang et al., "SVD-LLM V2", NAACL 2025, arXiv:2503.12340; Jaiswal et al., "From Low Rank Gradient Subspace
        Stabilization to Low-Rank Weights" (WeLore), ICML 2025, arXiv:2407.11239.
    """
    check_ratio(ratio)
    check_form(form)
    _check(matrices, policy, minimum)
    if maximum is not None and maximum < minimum:
        raise ValueError(f"maximum must be at least the minimum {minimum}, not {maximum}")
    if not 0 < dense_from <= 1:
        raise ValueError(f"dense_from is a fraction of the ranks, above 0 to 1, not {dense_from}")
    if not matrices:
        return {}
    total = sum(math.prod(matrix.shape) for matrix in matrices)
    problem = _Problem(matrices, math.floor((1 - ratio) * total), form, minimum, maximum, dense_from)
    least = problem.cost(problem.least())
    if least > problem.budget:
        feasible = math.floor((1 - least / total) * 1e4) / 1e4
        raise ValueError(
            f"ratio {ratio} leaves {problem.budget} parameters, but rank {minimum} everywhere needs {least}; "
            f"use a ratio of at most {feasible:g}"
        )
    share: dict[str, Callable[[_Problem, float], list[int]]] = {
        "uniform": _uniform,
        "threshold": lambda problem, _: _threshold(problem),
        "svd-llm-v2": _svd_llm_v2,
        "welore": lambda problem, _: _welore(problem),
    }
    ranks = share[policy](problem, ratio)
    return {matrix.name: rank for matrix, rank in zip(matrices, ranks, strict=True)}


class _Problem:
    """The matrices with their costs; policies propose wishes, it turns them into admissible ranks."""

    def __init__(
        self,
        matrices: Sequence[Matrix],
        budget: int,
        form: Form,
        minimum: int,
        maximum: int | None = None,
        dense_from: float = 1.0,
    ) -> None:
        self.matrices, self.budget, self.form, self.minimum = matrices, budget, form, minimum
        self.maximum, self.dense_from = maximum, dense_from

    def admissible(self, wishes: Sequence[int]) -> list[int]:
        """From ``minimum`` to ``maximum``; dense from break-even, or ``dense_from``, on."""
        return [self.admissible_for(matrix, wish) for matrix, wish in zip(self.matrices, wishes, strict=True)]

    def admissible_for(self, matrix: Matrix, wish: int) -> int:
        """The rank that one matrix gets for a wish; it grows with the wish."""
        m, n = matrix.shape
        rank = max(wish, self.minimum)
        if self.maximum is not None:
            rank = min(rank, self.maximum)
        # The margin is for fractions such as 1 - 0.9, which fall short of their number of ranks by rounding.
        stays = min(break_even_rank(m, n, self.form), self.dense_from * min(m, n) - 1e-9)
        return rank if rank < stays else min(m, n)

    def least(self) -> list[int]:
        """The smallest admissible ranks."""
        return self.admissible([0] * len(self.matrices))

    def cost_of(self, matrix: Matrix, rank: int) -> int:
        """Numbers stored for one matrix at an admissible rank."""
        m, n = matrix.shape
        return m * n if rank >= min(m, n) else num_parameters(m, n, rank, self.form)

    def cost(self, ranks: Sequence[int]) -> int:
        """Numbers stored for all."""
        return sum(self.cost_of(matrix, rank) for matrix, rank in zip(self.matrices, ranks, strict=True))

    def keep(self, fractions: Sequence[float]) -> list[int]:
        """The largest admissible ranks that keep at most these fractions of each matrix."""
        return self.admissible(
            [
                rank_for_parameters(*matrix.shape, math.floor(fraction * math.prod(matrix.shape)), self.form)
                for matrix, fraction in zip(self.matrices, fractions, strict=True)
            ]
        )

    def spectra(self) -> list[np.ndarray]:
        """Singular values in float64, largest first."""
        return [np.sort(_values(matrix))[::-1] for matrix in self.matrices]

    def fit(self, ranks_at: Callable[[float], list[int]]) -> list[int]:
        """Ranks at the largest t in [0, 1] that meets the budget, by bisection; ranks grow with t."""
        ranks = ranks_at(1.0)
        if self.cost(ranks) <= self.budget:
            return ranks
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            if self.cost(ranks_at(middle)) <= self.budget:
                low = middle
            else:
                high = middle
        return ranks_at(low)


def _uniform(problem: _Problem, ratio: float) -> list[int]:
    """The same fraction kept everywhere; less only where ``minimum`` forces some matrices above it."""
    return problem.fit(lambda t: problem.keep([t * (1 - ratio)] * len(problem.matrices)))


def _threshold(problem: _Problem) -> list[int]:
    """The most energy for the budget."""
    choices = []
    for matrix, s, least in zip(problem.matrices, problem.spectra(), problem.least(), strict=True):
        wishes = range(least, min(matrix.shape) + 1)
        ranks = np.array(sorted({problem.admissible_for(matrix, wish) for wish in wishes}))
        costs = np.array([problem.cost_of(matrix, int(rank)) for rank in ranks])
        choices.append((ranks, costs, np.concatenate([[0.0], np.cumsum(s**2)])[ranks]))
    return best_ranks(choices, problem.budget)


def _svd_llm_v2(problem: _Problem, ratio: float) -> list[int]:
    """Removal in proportion to 1 / log(loss) within each group of matrices.

        L_i = sqrt(sum over j > k0 of s_ij^2),  k0 the uniform rank,   c_i = 1 / log(e L_i / min L),   R_i ~ c_i

    The published score is 1 / log(L), which depends on the scale of the inputs and changes sign at L = 1; dividing by
    the smallest loss of the group, times e, makes the logarithm at least 1. Losses below 1e-6 of the largest count as
    that. R_i is clipped to 1 and scaled so that each group keeps its share of the budget.
    """
    uniform = problem.keep([1 - ratio] * len(problem.matrices))
    losses = [float(np.sqrt((s[k:] ** 2).sum())) for s, k in zip(problem.spectra(), uniform, strict=True)]
    members: dict[str, list[int]] = defaultdict(list)
    for index, matrix in enumerate(problem.matrices):
        members[matrix.group].append(index)
    removed = np.empty(len(losses))
    for indices in members.values():
        loss = np.array([losses[i] for i in indices])
        sizes = np.array([math.prod(problem.matrices[i].shape) for i in indices], dtype=np.float64)
        loss = np.maximum(loss, 1e-6 * loss.max()) if loss.max() > 0 else np.ones_like(loss)
        removed[indices] = _proportional(1 / (1 + np.log(loss / loss.min())), sizes, ratio)
    return problem.fit(lambda t: problem.keep((t * (1 - removed)).tolist()))


def _proportional(scores: np.ndarray, sizes: np.ndarray, ratio: float) -> np.ndarray:
    """min(1, c scores) with c such that the average weighted by ``sizes`` is ``ratio``."""
    low, high = 0.0, 1.0 / float(scores.min())
    for _ in range(100):
        middle = (low + high) / 2
        if float((np.minimum(1, middle * scores) * sizes).sum()) < ratio * sizes.sum():
            low = middle
        else:
            high = middle
    return np.minimum(1, high * scores)


def _welore(problem: _Problem) -> list[int]:
    """Ranks by one threshold on (s - min s) / (max s - min s), the smallest that meets the budget.

    The published threshold is a quantile of the pooled values, which meets a budget of ranks; here it is searched among
    the pooled values so that the budget of PARAMETERS is met. A flat spectrum counts as all ones, a zero one as zeros.
    """
    normalised = []
    for s in problem.spectra():
        width = s[0] - s[-1] if s.size else 0.0
        normalised.append((s - s[-1]) / width if width > 0 else (s > 0).astype(np.float64))
    pooled = np.unique(np.concatenate(normalised))
    ascending = [s[::-1] for s in normalised]

    def ranks_at(threshold: float) -> list[int]:
        return problem.admissible([s.size - int(np.searchsorted(s, threshold)) for s in ascending])

    candidates = [*pooled.tolist(), math.inf]
    first = bisect.bisect_left(candidates, True, key=lambda kappa: problem.cost(ranks_at(kappa)) <= problem.budget)
    return ranks_at(candidates[first])


def _values(matrix: Matrix) -> np.ndarray:
    assert matrix.spectrum is not None
    return torch.as_tensor(matrix.spectrum).detach().to(device="cpu", dtype=torch.float64).numpy()


def _check(matrices: Sequence[Matrix], policy: str, minimum: int) -> None:
    if policy not in get_args(Policy):
        raise ValueError(f"policy must be one of {', '.join(get_args(Policy))}, not {policy!r}")
    if minimum < 1:
        raise ValueError(f"minimum must be at least 1, not {minimum}")
    seen: set[str] = set()
    for matrix in matrices:
        if matrix.name in seen:
            raise ValueError(f"two matrices are called {matrix.name!r}; names must be unique")
        seen.add(matrix.name)
        if policy == "uniform":
            continue
        if matrix.spectrum is None:
            raise ValueError(f'{matrix.name}: policy "{policy}" needs the singular values; give Matrix a spectrum')
        values = _values(matrix)
        if values.shape != (min(matrix.shape),) or not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(
                f"{matrix.name}: the spectrum must be {min(matrix.shape)} finite values >= 0 for shape "
                f"{matrix.shape}, not shape {values.shape}; give linalg.singular_values of the matrix"
            )
