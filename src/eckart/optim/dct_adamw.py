"""DCT-AdamW: AdamW on the r coordinates of the gradient in a cosine basis that hold most of it.

    S = A Q (a, b),   I = the r columns of S with the largest norm,   R = S_I,   D = scale · N(R) Q_Iᵀ

A is G or Gᵀ with the shorter axis second, and Q (b, b) the matrix of the DCT-III, the same for every layer of a width:
all that is stored of a subspace is its r indices. When they change, moments of columns that stay are kept, and those of
new ones start at 0. With ``error_feedback`` what was left out, E = A - R Q_Iᵀ, is added to the next gradient.

I.-V. Modoranu, M. Safaryan, E. Schultheis, D. Alistarh, "SVD-Free Low-Rank Adaptive Gradient Optimization for Large
Language Models", 2025, arXiv:2505.17967. Code: github.com/IST-DASLab/ISTA-DASLab-Optimizers.

What differs. S is computed by the fast transform, never with a stored Q: from a width of 512 on in less time than the
product takes, whatever r is. The official code takes Q or its transpose depending on a switch: ``transform``. It keeps
the selected columns in the order of their norms and, by default, the moments where they are, so that a number is the
moment of another column at every step; here indices are sorted and moments always follow them. Its error feedback in
four bits and its division of the layers among processes are left out: moments follow the sharding of the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..linalg.transforms import DCT
from .contract import ProjectedMethod, Step, turned
from .moments import State, allocate, load, reindexed, store
from .optimizer import ProjectedOptimizer
from .sharding import by_rows, from_local, lift_product, local, whole

__all__ = ["DCTAdamW", "DCTAdamW8bit", "DCTProjection"]

Transform = Literal["dct3", "dct2"]
Norm = Literal[1, 2]


@dataclass(frozen=True)
class DCTProjection(ProjectedMethod):
    """The options of DCT-AdamW.

    A gradient whose projected axis FSDP2 shards is exchanged between the processes once a step, as a whole matrix, but
    none holds it whole.

    Args:
        eps: 1e-8 in the official code.
        scale: Multiplies the update; the paper has none.
        update_interval: Updates between two selections; 1 in the official code. Above that, layers take turns.
        norm: 1 or 2, the norm of a column by which it is selected; 1 in the official code. With 2 no other r columns
            leave less of the gradient out.
        transform: Q, whose columns are the basis: "dct3" as in the paper, or "dct2", its transpose, which the official
            code uses with Makhoul's algorithm.
        error_feedback: Whether what is left out of a gradient is added to the next; costs a matrix in as many ``bits``
            as the moments; off in the official code.
    """

    eps: float = 1e-8
    scale: float = 1.0
    update_interval: int = 1
    norm: Norm = 1
    transform: Transform = "dct3"
    error_feedback: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(update_interval=self.update_interval)
        self.check_choices(norm=Norm, transform=Transform)

    def allocate(self, like: Tensor) -> State:
        """Indices, moments, and the error if it is fed back."""
        return {**super().allocate(like), **(allocate("error", like, bits=self.bits) if self.error_feedback else {})}

    def allocate_basis(self, basis: Tensor) -> State:
        """r indices."""
        return {"indices": torch.zeros(basis.shape[1], dtype=torch.int32, device=basis.device)}

    def direction(self, gradient: Tensor, state: State, step: Step, weight: Tensor) -> Tensor:
        """As in general, of the gradient and what has been left out before."""
        if self.error_feedback:
            gradient = gradient + load(state, "error", gradient.dtype)
        return super().direction(gradient, state, step, weight)

    def project(self, a: Tensor, state: State, step: Step) -> Tensor:
        """Selects anew when it is due; R is a part of S."""
        rows = by_rows(a)
        s = from_local(self.coordinates(local(rows)), rows)
        if step.due(self.update_interval):
            assert self.rank is not None
            fresh = select_columns(s, self.rank, self.norm).to(torch.int32)
            if step.number > 1:
                self.carry(state, fresh, s.dtype)
            state["indices"].copy_(fresh)
        return from_local(local(s).index_select(1, state["indices"]), s, shape=(s.shape[0], len(state["indices"])))

    def coordinates(self, a: Tensor) -> Tensor:
        """S = A Q (a, b)."""
        return DCT().adjoint(a) if self.transform == "dct3" else DCT().forward(a)

    def columns(self, indices: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """Q_I (b, r), rounded once from double precision."""
        chosen = torch.zeros(len(indices), size, dtype=torch.float64, device=indices.device)
        chosen.scatter_(1, indices.long()[:, None], 1)
        return (DCT().forward(chosen) if self.transform == "dct3" else DCT().adjoint(chosen)).to(dtype).mT

    def carry(self, state: State, fresh: Tensor, dtype: torch.dtype) -> None:
        """Move the moments of the columns that stay selected to where they are in the new selection."""
        for name in [name for name in ("first", "second", "columns") if name in state]:
            store(state, name, reindexed(load(state, name, dtype), state["indices"], fresh))

    def lift(self, n: Tensor, a: Tensor, state: State) -> Tensor:
        """n Q_Iᵀ (a, b)."""
        return lift_product(n, self.columns(state["indices"], a.shape[1], n.dtype), a)

    def combine(self, a: Tensor, low: Tensor, n: Tensor, state: State, step: Step) -> Tensor:
        """The lifted update; keeps the error."""
        if self.error_feedback:
            kept, error = state["error"], a - self.lift(low, a, state)
            store(state, "error", error if turned(kept, self.side) is kept else error.mT)
        return super().combine(a, low, n, state, step)


def select_columns(s: Tensor, count: int, norm: Norm = 1) -> Tensor:
    """The sorted indices of the columns with the largest norms, the same in every process.

    Args:
        s: S (a, b), rows may be sharded.
        count: r.
        norm: 1 or 2.

    Example:
        >>> select_columns(torch.tensor([[3.0, 0.0, 2.0], [0.0, 1.0, 2.0]]), 2).tolist()
        [0, 2]
    """
    sizes = whole((s.abs() if norm == 1 else s.square()).sum(dim=0))
    return sizes.topk(count, sorted=False).indices.sort().values


class DCTAdamW(ProjectedOptimizer):
    """AdamW on selected cosine coordinates of gradients. Options as `DCTProjection` and `ProjectedOptimizer`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(8, 6))
        >>> optimizer = DCTAdamW([weight], lr=0.1, rank=2)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> {name: tuple(value.shape) for name, value in optimizer.state[weight].items()}
        {'step': (), 'indices': (2,), 'first': (8, 2), 'second': (8, 2)}
    """

    method: ClassVar[type[DCTProjection]] = DCTProjection
    options: ClassVar[dict[str, Any]] = {}


class DCTAdamW8bit(DCTAdamW):
    """`DCTAdamW` with moments of eight bits."""

    options: ClassVar[dict[str, Any]] = {"bits": 8}
