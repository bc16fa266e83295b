"""LIFT: Adam on the few entries of each matrix that are largest once the matrix has been reduced to a low rank.

    W_r = W Q Qᵀ,   I = the k largest |W_r|,   k = min((m + n) · rank, m n),   W_I ← W_I - lr N(G_I)

Q (n, r) holds the leading right singular vectors of W (m, n), and r is ``filter_rank``. All other entries keep their
bits. The entries are chosen anew from the trained weights every ``update_interval`` updates; moments of those that are
chosen again are kept. For fine-tuning: embeddings, head, norms and biases are left as they are.

Z. Liu, T. Pang, O. Balabanov, C. Yang, T. Huang, L. Yin, Y. Yang, S. Liu, "LIFT the Veil for the Truth: Principal
Weights Emerge after Rank Reduction for Reasoning-Focused Supervised Fine-Tuning", ICML 2025, arXiv:2506.00772. Code:
github.com/zihanghliu/LIFT.

What differs. The official code, as its configurations are today, selects the k smallest entries of W_r, against the
paper; here the largest. It decomposes every matrix in full, all in the same step; here block Lanczos iteration finds
the r vectors, and the matrices take their turns. A cheaper decomposition does not do: trained weights have flat
spectra, and one within 1 % of the least error can share less than half of the mask with the exact one. Weight decay,
which has no effect there, acts on the chosen entries. The k entries are no rows or columns, so their moments cannot be
sharded as the weight is: under FSDP2 every process holds all of them, gradients of the k entries are summed over the
processes, and at a selection each forms one W_r at a time from gathered factors of rank r.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..linalg import leading_eigenvectors
from .contract import OptimizerMethod, Step
from .entries import entries, set_entries
from .moments import State, load, reindexed, store
from .optimizer import ProjectedOptimizer
from .projection import scaled_gram
from .sharding import local, right_product, whole

__all__ = ["LIFT", "LIFTAdamW", "LIFTAdamW8bit"]

Selection = Literal["lift", "magnitude", "gradient", "random"]

_TOL = 1e-3  # of the singular vectors; of trained weights more than 99 % of the mask are then those of exact ones
_BLOCK = 256  # entries that share a scale in eight bits


@dataclass(frozen=True)
class LIFT(OptimizerMethod):
    """The options of LIFT.

    Args:
        rank: Sets the number of entries, k = min((m + n) · rank, m n), which is that of LoRA of this rank; None leaves
            a matrix out.
        betas: As in the official code.
        trains_rest: Whether embeddings, head, norms and biases are trained too, with dense moments; not in the paper.
        filter_rank: r, of the low-rank approximation; None for ``rank``, as the authors recommend.
        update_interval: Updates between two selections; 400 in most of the authors' configurations, from 10 to 2000.
        selection: What has to be large: "lift" is |W_r|, "magnitude" |W|, "gradient" |G| at the selection, "random"
            draws. Under FSDP2 "magnitude" and "gradient" gather a matrix.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    trains_rest: bool = False
    filter_rank: int | None = None
    update_interval: int = 400
    selection: Selection = "lift"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(update_interval=self.update_interval)
        if self.filter_rank is not None:
            self.check_positive(filter_rank=self.filter_rank)
        self.check_choices(selection=Selection)
        if self.rule == "adafactor":
            raise ValueError("rule must not be 'adafactor': single entries have no rows and columns; take 'adamw'")

    def fits(self, shape: Sequence[int]) -> bool:
        """Every matrix with a rank."""
        return len(shape) == 2 and self.rank is not None

    def allocate(self, like: Tensor) -> State:
        """Indices (k,) and moments, (k,) in 32 bits and in rows of 256 in 8."""
        assert self.rank is not None
        k = min(sum(like.shape) * self.rank, like.numel())
        narrow = like.numel() <= torch.iinfo(torch.int32).max
        indices = torch.zeros(k, dtype=torch.int32 if narrow else torch.int64, device=like.device)
        return {"indices": indices, **self.moments().allocate(self.shaped(local(like).new_zeros(k)))}

    def direction(self, gradient: Tensor, state: State, step: Step, weight: Tensor) -> Tensor:
        """The rule's update of the chosen entries, 0 elsewhere."""
        if step.due(self.update_interval):
            self.select(gradient, state, step, weight.to(gradient.dtype))
        indices, update = state["indices"], torch.zeros_like(gradient)
        n = self.moments().direction(self.shaped(entries(gradient, indices)), state, step.number)
        set_entries(update, indices, n.flatten()[: len(indices)])
        return update

    def decay_mask(self, weight: Tensor, state: State) -> Tensor:
        """The chosen entries."""
        indices, mask = state["indices"], torch.zeros_like(weight, dtype=torch.bool)
        set_entries(mask, indices, torch.ones_like(indices, dtype=torch.bool))
        return mask

    def select(self, gradient: Tensor, state: State, step: Step, weight: Tensor) -> None:
        """Choose entries, and bring the moments that are kept to their places."""
        indices = state["indices"]
        generator = step.generator(weight.device)
        if self.selection == "random":
            scores = torch.rand(weight.numel(), generator=generator, device=weight.device)
        elif self.selection == "lift":
            rank = self.filter_rank or self.rank
            assert rank is not None
            scores = low_rank_magnitude(weight, rank, generator)
        else:
            scores = whole(weight if self.selection == "magnitude" else gradient).abs()
        fresh = scores.flatten().topk(len(indices), sorted=False).indices.sort().values.to(indices.dtype)
        if step.number > 1:
            for name in [name for name in ("first", "second") if name in state]:
                kept = load(state, name, gradient.dtype).flatten()[: len(indices)]
                store(state, name, self.shaped(reindexed(kept, indices, fresh)))
        indices.copy_(fresh)

    def shaped(self, values: Tensor) -> Tensor:
        """(k,) as it is, or with zeros at its end in rows of 256, each of which shares a scale in eight bits."""
        if self.bits == 32:
            return values
        return torch.nn.functional.pad(values, (0, -len(values) % _BLOCK)).view(-1, _BLOCK)


def low_rank_magnitude(weight: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """|W_r| (m, n), plain and the same in every process.

    Args:
        weight: W (m, n), rows may be sharded; only products with Q (n, r) are exchanged.
        rank: r; W itself where it is not below m and n.
        generator: Source of the random start, on W's device.

    Example:
        >>> w = torch.tensor([[3.0, 0.0, 3.0], [0.0, 4.0, 0.0], [3.0, 0.0, 3.0]])
        >>> low_rank_magnitude(w, 1, torch.Generator()).round(decimals=3)[1].tolist()
        [0.0, 0.0, 0.0]
    """
    if rank >= min(weight.shape):
        return whole(weight).abs()
    size, dtype = weight.shape[1], weight.dtype
    q = leading_eigenvectors(scaled_gram(weight), size, rank, tol=_TOL, dtype=dtype, generator=generator)
    return (whole(right_product(weight, q)) @ q.mT).abs_()


class LIFTAdamW(ProjectedOptimizer):
    """AdamW on the principal entries of each matrix. Options as `LIFT` and `ProjectedOptimizer`.

    Weights in bfloat16 need ``stochastic_rounding``: the chosen ones are large, and updates below a 256th of them are
    lost otherwise. Split a weight that fuses several maps, such as those of queries, keys and values: it shares one k.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.arange(1.0, 25.0).reshape(4, 6))
        >>> optimizer = LIFTAdamW([weight], lr=0.1, rank=1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> int((weight != torch.arange(1.0, 25.0).reshape(4, 6)).sum())
        10
    """

    method: ClassVar[type[LIFT]] = LIFT
    options: ClassVar[dict[str, Any]] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; warns of bfloat16 weights that are not rounded at random."""
        super().add_param_group(param_group)
        if not self._stochastic and any(p.dtype == torch.bfloat16 for p in self.param_groups[-1]["params"]):
            warnings.warn(
                "updates of the large entries that LIFT trains are mostly lost in bfloat16; pass "
                "stochastic_rounding=True",
                stacklevel=2,
            )


class LIFTAdamW8bit(LIFTAdamW):
    """`LIFTAdamW` with moments of eight bits."""

    options: ClassVar[dict[str, Any]] = {"bits": 8}
