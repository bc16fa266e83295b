"""GaLore+: GaLore with the subspace of one attention head for all heads, and dense moments of what it misses most.

    A = [A₁; ...; A_h] (h d, b),   Q (b, r) leading right singular vectors of Aᵢ, i drawn anew for every refresh
    R = A Q,   D = scale · N(R) Qᵀ,   and after a warm-up   D[I] = scale · N(A[I]),   I the k largest of Σ |A - R Qᵀ|

A is G for queries, keys and values, whose heads are rows, and Gᵀ for the output projection, whose heads are columns.
Other matrices are one head, and A is G or Gᵀ, as in GaLore. N is Adam's step. The state is GaLore's, k places and 2 k
moments.

X. Liao, S. Li, Y. Xu, Z. Li, Y. Liu, Y. He, "GaLore+: Boosting Low-Rank Adaptation for LLMs with Cross-Head
Projection", 2024, arXiv:2412.19820. No code is published.

What differs. Where r is above d, as many heads are drawn as have r directions together. The randomized subspace
iteration goes on from the basis that is there (see `eckart.optim.projection`). The sparse residual is reconstructed
from the paper's abstract and public reviews: residuals of the low-rank moments are stored on I and added to them. Here
their sum is stored, which is the moments of A[I]: the same under one basis, still right when the basis changes, and
without a further product. The sum that I is taken from would be a dense matrix; instead k candidates are kept (see
`running_top`), which is exact for a warm-up of one step. The length of the warm-up is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .contract import Step
from .entries import add_entries, entries, gathered_rows, set_entries, top_entries
from .galore import GaLore
from .moments import State
from .optimizer import ProjectedOptimizer
from .sharding import right_product

__all__ = ["GaLorePlus", "GaLorePlusAdamW", "GaLorePlusAdamW8bit", "running_top"]

_NEWCOMER = 0.8  # share of the least score that an entry starts from when it becomes a candidate


@dataclass(frozen=True)
class GaLorePlus(GaLore):
    """The options of GaLore+, after those of `GaLore`.

    Args:
        head_dim: d, rows of a head where ``side`` is "right", columns where it is "left"; None for a matrix without
            heads. `eckart.optim.head_groups` finds it.
        density: k / (m n), share of the entries that have moments of their own; 0.012 is the middle one of the
            paper's 0.006, 0.012 and 0.018. 0 for none.
        warmup: Updates in which these entries are chosen; ours.
    """

    head_dim: int | None = None
    density: float = 0.012
    warmup: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(warmup=self.warmup)
        if not 0 <= self.density <= 1:
            raise ValueError(f"density must be from 0 to 1, not {self.density}")
        if self.density and self.rule == "sgd" and self.betas[0] == 0:
            raise ValueError("without momentum there are no moments to correct; give density=0 or a betas[0] above 0")
        if self.head_dim is None:
            return
        self.check_positive(head_dim=self.head_dim)
        if self.side not in ("left", "right"):
            raise ValueError("head_dim needs side='right' where heads are rows, or side='left' where they are columns")

    def check_shape(self, name: str, shape: Sequence[int]) -> None:
        """Refuse a matrix that is no whole number of heads."""
        axis, what = (0, "rows") if self.side == "right" else (1, "columns")
        if self.head_dim is not None and shape[axis] % self.head_dim:
            raise ValueError(
                f"{name} has {shape[axis]} {what}, no whole number of heads of {self.head_dim}; give head_dim in the "
                "groups of attention's matrices only, as eckart.optim.head_groups does"
            )

    def allocate(self, like: Tensor) -> State:
        """GaLore's, and the places and moments of single entries."""
        state = super().allocate(like)
        if self.density == 0:
            return state
        count = max(1, round(self.density * like.numel()))
        moments = self.moments().allocate(torch.zeros(count, dtype=like.dtype, device=like.device))
        index = torch.zeros(count, dtype=torch.int64, device=like.device)
        return {**state, "entries": index, **{f"entries_{name}": value for name, value in moments.items()}}

    def fresh_basis(self, a: Tensor, start: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """Q (b, r) from the heads that are drawn, and R = A Q of all."""
        if self.head_dim is None:
            return super().fresh_basis(a, start, step)
        assert self.rank is not None
        heads, needed = a.shape[0] // self.head_dim, -(-self.rank // self.head_dim)
        if needed >= heads:
            return super().fresh_basis(a, start, step)
        drawn = torch.randperm(heads, generator=step.generator())[:needed].sort().values
        rows = (drawn[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()
        fresh, _ = super().fresh_basis(gathered_rows(a, rows.to(a.device)), start, step)
        return fresh, right_product(a, fresh)

    def combine(self, a: Tensor, low: Tensor, n: Tensor, state: State, step: Step) -> Tensor:
        """The lifted update, and on I that of the entries' own moments."""
        update = super().combine(a, low, n, state, step)
        if self.density == 0:
            return update
        index, first = state["entries"], state["entries_first"]
        if step.number > self.warmup:
            moments = {name: state[f"entries_{name}"] for name in ("first", "second") if f"entries_{name}" in state}
            own = self.moments().direction(entries(a, index), moments, step.number - self.warmup)
            set_entries(update, index, own * self.scale)
            return update
        missed = self.lift(low, a, state).neg_().add_(a).abs_()
        running_top(missed, index, first)
        if step.number == self.warmup:
            index.copy_(index.sort().values)
            first.zero_()
        return update


def running_top(new: Tensor, index: Tensor, scores: Tensor) -> None:
    """Brings candidates for the k largest entries of a sum of matrices up to date with one more of them.

    A candidate's score is the sum since it became one, and what it had then: 0.8 of the least score, as it was not far
    from being one before. What is found after 10 to 50 matrices of normal entries, their sizes log-normal with a spread
    of 0.25 to 1.5, has 89 to 99 % of the sum that the k largest have; of a newcomer that starts from 0, 80 to 96 %.

    Args:
        new: (a, b), not negative; changed.
        index: (k,) places of the candidates; changed in place. All 0 before the first matrix.
        scores: (k,) of the candidates; changed in place. All 0 before the first matrix.

    Example:
        >>> index, scores = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
        >>> running_top(torch.tensor([[3.0, 0.0, 1.0]]), index, scores)
        >>> running_top(torch.tensor([[0.5, 2.0, 0.0]]), index, scores)
        >>> index, scores
        (tensor([0, 1]), tensor([3.5000, 2.8000]))
    """
    start = _NEWCOMER * scores.min()
    add_entries(new, index, scores - start)
    found, places = top_entries(new, len(index))
    index.copy_(places)
    scores.copy_(found + start)


class GaLorePlusAdamW(ProjectedOptimizer):
    """AdamW on gradients projected head by head. Options as `GaLorePlus` and `ProjectedOptimizer`.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(8, 6))  # queries of two heads
        >>> optimizer = GaLorePlusAdamW([weight], lr=0.1, rank=2, side="right", head_dim=4)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[weight])
        ['basis', 'entries', 'entries_first', 'entries_second', 'first', 'second', 'step']
    """

    method: ClassVar[type[GaLorePlus]] = GaLorePlus
    options: ClassVar[dict[str, Any]] = {}


class GaLorePlusAdamW8bit(GaLorePlusAdamW):
    """`GaLorePlusAdamW` with projected moments of eight bits; those of single entries stay in 32."""

    options: ClassVar[dict[str, Any]] = {"bits": 8}
