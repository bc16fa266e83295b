"""DSEE: a low-rank update with a few single entries, then a mask on the base drawn from that update.

    y = x (W ⊙ M + c (B A + S))ᵀ,   A (r, in), B (out, r), S sparse with N trained values at fixed places Ω
    A from N(0, 0.02²), B = S = 0, M all ones at first

    Ω: where a decomposition of W into rank r plus sparse has its N nonzeros
    M: after a share ``at`` of the training, 0 where |c (B A + S)| is smallest, for a share ``prune`` of the entries of
    all adapted weights together; then A, B and S train on

X. Chen, T. Chen, W. Chen, A. H. Awadallah, Z. Wang, Y. Cheng, DSEE: Dually Sparsity-embedded Efficient Tuning of
Pre-trained Language Models, ACL 2023, arXiv 2111.00160; code: VITA-Group/DSEE. The paper adapts query and value.

Different here: S is N values and their places, not a dense matrix under a mask; Ω comes from GoDec in place of a
hundred QR sweeps with a threshold made for BERT. The base stays as it is: M is a term of the update, c (B A + S) -
W ⊙ (1 - M). For that the adapter carries a copy of the weight until it is pruned, and from then on the dropped entries,
with which each forward pass multiplies too. As in the released code B A is not masked: W ⊙ M is sparse, a merged weight
is not. Only adapted weights are pruned, where the code prunes key and output by their own magnitude besides. Removing
whole heads, and the code's importances that divide by B A + S, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linalg import most_important, robust_pca
from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .coordinator import Coordinator
from .site import Site

__all__ = ["DSEE", "sparse_support"]

Support = Literal["decomposition", "magnitude", "random"]
Importance = Literal["update", "weight", "both"]


def sparse_support(weight: Tensor, count: int, rank: int, support: Support, generator: torch.Generator) -> Tensor:
    """Places (count,) int64 of single entries of a weight, as indices into its rows one after the other, ascending.

    Args:
        weight: (out, in).
        count: N.
        rank: Of the part that is taken off before the largest entries are looked for.
        support: "decomposition", the largest entries of the sparse part; "magnitude", of W; or "random".
        generator: Source of randomness, on the CPU.
    """
    if support == "random":
        return torch.randperm(weight.numel(), generator=generator)[:count].to(weight.device).sort().values
    if support == "decomposition":
        weight = robust_pca(weight, method="godec", rank=rank, sparsity=count).sparse
    return weight.abs().flatten().topk(count).indices.sort().values


@dataclass(frozen=True)
class DSEE(AdapterMethod):
    """Dually sparsity-embedded efficient tuning.

    Attributes:
        nonzeros: N, single entries trained in each weight.
        support: Where they are: "decomposition" (what low rank does not explain), "magnitude" or "random".
        prune: Share of the base entries that are dropped, over all layers together; 0 for none, which also saves the
            copy of the weight.
        at: When, as a share of the optimizer steps. The paper trains five epochs before and ten after.
        importance: What an entry is judged by: the size of the "update" (the paper), of the "weight", or of their sum,
            "both".

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = DSEE(nonzeros=5).build(site, rank=2, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator().manual_seed(0))
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max())
        (33, 0.0)
    """

    nonzeros: int = 16
    support: Support = "decomposition"
    prune: float = 0.2
    at: float = 1 / 3
    importance: Importance = "update"

    def __post_init__(self) -> None:
        if self.nonzeros < 1:
            raise ValueError(f"nonzeros must be at least 1, not {self.nonzeros}; the paper uses 16 and more")
        self.check_choices(support=Support, importance=Importance)
        if not 0 <= self.prune < 1:
            raise ValueError(f"prune must be a share of at least 0 and below 1, not {self.prune}")
        if not 0 <= self.at <= 1:
            raise ValueError(f"at must be a share of the training, 0 to 1, not {self.at}")

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """B, A and the values of S trained."""
        return _DSEEAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r (in + out) + N."""
        return rank * (site.in_features + site.out_features) + self.nonzeros

    def check(self, site: Site, rank: int) -> str | None:
        """Also whether the weight has N entries."""
        problem = super().check(site, rank)
        if problem is None and self.nonzeros > site.out_features * site.in_features:
            return f"has {site.out_features * site.in_features} entries, fewer than nonzeros = {self.nonzeros}"
        return problem

    def coordinate(self, adapters: Mapping[str, Adapter], seed: int) -> Coordinator | None:
        """What prunes, where something is to be pruned."""
        return _Pruning(self, adapters, seed) if self.prune else None


class _DSEEAdapter(Adapter):
    left: Tensor
    right: Tensor
    values: Tensor
    places: Tensor
    dropped: Tensor
    pruned: Tensor

    def __init__(self, method: DSEE, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.method, self.scale = method, scale
        self.parameter("left", site.out_features, rank)  # B
        self.parameter("right", rank, site.in_features)  # A
        self.parameter("values", method.nonzeros)
        # Integers: a float index would be rounded by `model.to(torch.bfloat16)`.
        self.register_buffer("places", torch.zeros(method.nonzeros, dtype=torch.int64))
        if method.prune:
            self.buffer("dropped", site.out_features, site.in_features)  # W, once pruned W ⊙ (1 - M)
            self.buffer("pruned")  # 0 or 1

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        method = self.method
        self.fill(
            left=torch.zeros_like(self.left),
            right=0.02 * torch.randn(self.right.shape, generator=generator),
            values=torch.zeros_like(self.values),
            places=sparse_support(weight, method.nonzeros, self.rank, method.support, generator),
        )
        if method.prune:
            self.fill(dropped=weight, pruned=torch.zeros(()))
        self.ready = True

    def update(self, x: Tensor) -> Tensor:
        rows, columns = self.places // self.site.in_features, self.places % self.site.in_features
        y = F.linear(F.linear(x, self.right), self.scale * self.left)
        single = x.index_select(-1, columns) * (self.scale * self.values)
        y = y.index_add(-1, rows, single.to(y.dtype))  # autocast has made the one, not the other, half precision
        return y - F.linear(x, self.dropped) if self.is_pruned() else y

    def delta(self, weight: Tensor) -> Tensor:
        change = self.learnt()
        return change - self.dropped if self.is_pruned() else change

    def learnt(self) -> Tensor:
        """c (B A + S), (out, in)."""
        low_rank = self.scale * (self.left @ self.right)
        values = self.scale * self.values.to(low_rank.dtype)
        return low_rank.flatten().index_add(0, self.places, values).view_as(low_rank)

    def is_pruned(self) -> bool:
        """Whether M has zeros; read from the tensor, since that is what a file brings."""
        return bool(self.method.prune) and bool(self.pruned)

    def importances(self) -> Tensor:
        """Of the entries of W, which are all there yet, (out, in)."""
        importance = self.method.importance
        if importance == "weight":
            return self.dropped.abs()
        return (self.learnt() + self.dropped if importance == "both" else self.learnt()).abs()

    def drop(self, kept: Tensor) -> None:
        """Set M (out, in), bool."""
        self.dropped.masked_fill_(kept.to(self.dropped.device), 0)
        self.pruned.fill_(1)


class _Pruning(Coordinator):
    """Prunes once; whether it is done is read from the adapters, so a resumed run does not do it again."""

    def __init__(self, method: DSEE, adapters: Mapping[str, Any], seed: int) -> None:
        super().__init__(adapters, seed)
        self.method = method

    def on_step(self, step: int, total: int) -> None:
        waiting = [a for a in self.adapters.values() if isinstance(a, _DSEEAdapter) and not a.is_pruned()]
        if not waiting or step < self.method.at * total:
            return
        scores = [adapter.importances().flatten().cpu() for adapter in waiting]
        entries = sum(score.numel() for score in scores)
        kept = most_important(scores, entries - round(self.method.prune * entries))
        for adapter, mask in zip(waiting, kept, strict=True):
            adapter.drop(mask.view_as(adapter.dropped))
