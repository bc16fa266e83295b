"""Hydra: a low-rank branch on the input of a layer beside one on its output.

    y = f + c U_p D_p x + c U_s D_s (f - b),   f = W x + b the output of the layer
    W' = W + c (U_p D_p + U_s D_s W),   D_p (p, in), U_p (out, p);   D_s (q, out), U_s (out, q);   both U start at 0

The parallel branch is LoRA and adds features; the sequential one mixes those the weight has, its change stays in the
row space of W. The paper puts them on layers that write to the residual stream (o_proj, down_proj).

S. Kim, H. Yang, Y. Kim, Y. Hong, E. Park, Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning,
2023, arXiv 2309.06922; code: extremebird/Hydra.

In the paper the sequential branch reads f with its bias, so merging changes the bias too: b' = b + c U_s D_s b. An
adapter here changes a weight and no bias, so the bias is taken off first, which is the same function for the layers of
most language models; ``read_bias=True`` is the paper's, trained and served, not merged. The vision code also trains
biases in D and U; they are left out, as is its dropout. Of the released code the language part never switches the
adapter on (its flag is misspelt), and the vision part merges the wrong weight into the attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .site import Site, SiteKind

__all__ = ["Hydra"]

Initial = Literal["kaiming", "xavier", "normal"]


@dataclass(frozen=True)
class Hydra(AdapterMethod):
    """Multi-head low-rank adaptation.

    Attributes:
        parallel: Rank p of the parallel branch; None for the configuration's. 0 leaves it out (SeqLoRA).
        sequential: Rank q of the sequential branch; None for the configuration's. 0 leaves it out (LoRA). The paper
            has p = q = 2 for images, p = 4 and q = 8 for text.
        init: D at the start: "kaiming" (uniform, as LoRA and the text code), "xavier" (uniform, VTAB) or "normal"
            (deviation 0.02, ELEVATER).
        read_bias: Whether the sequential branch reads the layer's output with its bias. The adapter then cannot be
            merged.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = Hydra(sequential=1).build(site, rank=2, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator().manual_seed(0))
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max())
        (44, 0.0)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d", "embedding"})

    parallel: int | None = None
    sequential: int | None = None
    init: Initial = "kaiming"
    read_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("parallel", "sequential"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be a rank, or 0 for none, not {getattr(self, name)}")
        if self.parallel == self.sequential == 0:
            raise ValueError("parallel and sequential are both 0: nothing is left to train; leave one of them out")
        self.check_choices(init=Initial)

    def branch_ranks(self, rank: int) -> tuple[int, int]:
        """p and q for the configuration's rank."""
        return rank if self.parallel is None else self.parallel, rank if self.sequential is None else self.sequential

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """Both branches trained."""
        return _HydraAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """p (in + out) + 2 q out."""
        p, q = self.branch_ranks(rank)
        return p * (site.in_features + site.out_features) + 2 * q * site.out_features

    def check(self, site: Site, rank: int) -> str | None:
        """Also whether both branches fit."""
        problem = super().check(site, rank)
        p, q = self.branch_ranks(rank)
        if problem is None and p > site.largest_rank:
            return f"has min(out, in) = {site.largest_rank}, so parallel must be at most that rank, not {p}"
        if problem is None and q > site.out_features:
            return f"has {site.out_features} outputs, so sequential must be at most that rank, not {q}"
        return problem


class _HydraAdapter(Adapter):
    parallel_down: Tensor
    parallel_up: Tensor
    sequential_down: Tensor
    sequential_up: Tensor

    def __init__(self, method: Hydra, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.method, self.scale = method, scale
        self.p, self.q = method.branch_ranks(rank)
        if self.p:
            self.parameter("parallel_down", self.p, site.in_features)
            self.parameter("parallel_up", site.out_features, self.p)
        if self.q:
            self.parameter("sequential_down", self.q, site.out_features)
            self.parameter("sequential_up", site.out_features, self.q)

    @torch.no_grad()
    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        for name, part in self.named_parameters():
            start = torch.zeros(part.shape)
            if name.endswith("down"):
                if self.method.init == "kaiming":
                    nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
                elif self.method.init == "xavier":
                    nn.init.xavier_uniform_(start, generator=generator)
                else:
                    nn.init.normal_(start, std=0.02, generator=generator)
            part.copy_(start)
        self.ready = True

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        y = result = base(x)
        if self.p:
            inner = x if self.site.kind == "embedding" else x.to(torch.float32)
            result = result + self.update(inner).to(y.dtype)
        if self.q:
            bias = None if self.method.read_bias else getattr(base, "bias", None)
            result = result + self._mixed(y.to(torch.float32), bias).to(y.dtype)
        return result

    def update(self, x: Tensor) -> Tensor:
        """Of the parallel branch."""
        return self.site.expand(self.site.reduce(x, self.parallel_down), self.scale * self.parallel_up)

    def _mixed(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """c U_s D_s (y - bias)."""
        z = self.site.expand(y, self.sequential_down)
        if bias is not None:
            offset = self.sequential_down @ bias.to(torch.float32)
            z = z - (offset[:, None, None] if self.site.kind == "conv2d" else offset)
        return self.site.expand(z, self.scale * self.sequential_up)

    def delta(self, weight: Tensor) -> Tensor:
        if self.method.read_bias:
            raise ValueError(
                f"{self.site.name}: the sequential branch reads the bias, so a merged weight would not do; use "
                "read_bias=False, the same function where the layer has no bias"
            )
        change = weight.new_zeros(()).expand_as(weight)
        if self.p:
            change = change + self.scale * (self.parallel_up @ self.parallel_down)
        if self.q:
            change = change + self.scale * (self.sequential_up @ (self.sequential_down @ weight))
        return change

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Factors of the parallel branch where it is alone; those of the sequential one depend on W."""
        return None if self.q else (self.scale * self.parallel_up, self.parallel_down)
