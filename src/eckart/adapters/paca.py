"""PaCA: train a few input columns of a weight, and keep only those inputs for the backward pass.

    y = x Wᵀ + c x_I Dᵀ,   I r of the in columns, fixed,   x_I (..., r),   D (out, r) trained from 0
    W' = W with c D added to its columns I

S. Woo, S. Namkung, S. Lee, I. Jeong, B. Kim, D. Jeon, PaCA: Partial Connection Adaptation for Efficient Fine-Tuning,
ICLR 2025, arXiv 2503.01905; code: WooSunghyeon/paca. It is LoRA with a frozen A of r rows of the identity, so it has
r out trained numbers; c = alpha / r does no more than scale the learning rate. The backward pass needs x_I and not x,
which saves memory only where nothing else keeps x: adapt all layers that read one input.

Different here: the authors train P = W_I / c and copy c P into the weight, in some forward passes only, so that it lags
behind the optimizer by a step; a weight decay pulls P, and with it what was pretrained, to zero. Here the trained part
is the difference D = P - P_0, apart from a base that stays as it is. That costs a second product with r columns, and
makes staleness impossible, quantized bases usable and a weight decay harmless.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .site import Site

__all__ = ["PaCA", "choose_columns"]

Selection = Literal["random", "largest", "smallest"]


def choose_columns(weight: Tensor, count: int, selection: Selection, generator: torch.Generator) -> Tensor:
    """Indices (count,) int64, ascending, of the columns to train.

    Args:
        weight: (out, in).
        count: How many, at most in.
        selection: "random", or those of "largest" or "smallest" Euclidean norm.
        generator: Source of randomness, on the CPU.
    """
    if selection == "random":
        chosen = torch.randperm(weight.shape[1], generator=generator)[:count].to(weight.device)
    else:
        chosen = weight.norm(dim=0).argsort(descending=selection == "largest", stable=True)[:count]
    return chosen.sort().values


@dataclass(frozen=True)
class PaCA(AdapterMethod):
    """Partial connection adaptation.

    Attributes:
        selection: Which columns are trained: "random" (the method), or those of "largest" or "smallest" norm.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = PaCA(selection="largest").build(site, rank=2, scale=1.0)
        >>> weight = torch.arange(6.0).expand(8, 6)
        >>> adapter.initialize(weight, None, torch.Generator())
        >>> adapter.num_trainable(), adapter.chosen.tolist()
        (16, [4, 5])
    """

    selection: Selection = "random"

    def __post_init__(self) -> None:
        self.check_choices(selection=Selection)

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """The change of r columns trained."""
        return _PaCAAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r out."""
        return rank * site.out_features


class _PaCAAdapter(Adapter):
    columns: Tensor
    chosen: Tensor

    def __init__(self, method: PaCA, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.method, self.scale = method, scale
        self.parameter("columns", site.out_features, rank)  # D
        # Integers: a float index would be rounded by `model.to(torch.bfloat16)`.
        self.register_buffer("chosen", torch.zeros(rank, dtype=torch.int64))

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        self.fill(
            columns=torch.zeros_like(self.columns),
            chosen=choose_columns(weight, self.rank, self.method.selection, generator),
        )
        self.ready = True

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        y = base(x)
        return y + self.update(x).to(y.dtype)

    def update(self, x: Tensor) -> Tensor:
        """c x_I Dᵀ for x of any dtype: only the chosen inputs are turned to float32, and remembered."""
        return F.linear(x.index_select(-1, self.chosen).to(torch.float32), self.scale * self.columns)

    def delta(self, weight: Tensor) -> Tensor:
        change = self.columns.new_zeros(self.site.out_features, self.site.in_features)
        return change.index_copy(1, self.chosen, self.scale * self.columns)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.scale * self.columns, F.one_hot(self.chosen, self.site.in_features).to(torch.float32)
