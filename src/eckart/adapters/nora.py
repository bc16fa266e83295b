"""NoRA: a small trained LoRA inside a frozen one, which is made of an activation-aware SVD of the weight.

    W D = U diag(s) Vᵀ,  D = diag(mean|x|^a)       B = U_r diag(s_r) (out, r),   A = V_rᵀ D⁻¹ (r, in), both frozen
    y = x (W + c B B' A' A)ᵀ,                      B' (r, r') and A' (r', r) trained, 2 r r' numbers

C. Lin, L. Li, D. Li, J. Zou, W. Xue, Y. Guo, NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models,
ICCV 2025, arXiv 2408.10280; code: lliai/LoRA-Zoo (nora/). Of the structures compared there this is the nested, serial
one. Different from the code: both its inner factors start at random, so the model changes before the first step (here
``init="code"``; by default B' = 0, as in LoRA); it divides by D on the wrong side, and its D has LoRA's alpha for an
exponent. A comes as diag(s_r)⁻¹ U_rᵀ W, the same without an inverse of D: an input that is always zero does no harm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..linalg import svd
from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .factored import LowRankAdapter
from .lora_xs import Split, place_spectrum
from .site import Site

__all__ = ["InnerStart", "NoRA", "activation_aware_svd"]

InnerStart = Literal["zero", "code"]


def activation_aware_svd(weight: Tensor, size: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The factorisation of rank r that is best on inputs of given sizes.

        min ||(W - B A) diag(size)||_F   is reached by   B A = U_r diag(s_r) right = U_r U_rᵀ W

    Args:
        weight: (out, in).
        size: (in,), not negative; where it is zero, ``weight`` does not count. All zero is taken as all one.
        rank: r.

    Returns:
        u (out, r) and s (r,) of weight diag(size), and right = diag(s)⁻¹ uᵀ weight (r, in), whose rows are orthonormal
        after a product with diag(size).
    """
    if not bool(size.any()):
        size = torch.ones_like(size)
    u, s, _, _ = svd(weight * size, rank)
    wanted = s > torch.finfo(s.dtype).eps * s[:1]
    return u, s, torch.where(wanted, 1 / torch.where(wanted, s, 1), 0)[:, None] * (u.mT @ weight)


@dataclass(frozen=True)
class NoRA(AdapterMethod):
    """Nested low-rank adaptation.

    Attributes:
        inner_rank: r', at most r. None for a quarter of r, at least 1; the code uses 16 inside a nearly full r. Below
            r / 2 it trains less than LoRA-XS.
        exponent: a of the activation scaling; 0.5 as in ASVD, 0 for the plain SVD.
        split: Where the singular values go: "left" (B, as in the paper), "right" (A), "even" (their roots in both) or
            "none".
        init: "zero": A' Kaiming uniform and B' = 0, so the layer starts as it was. "code": both Kaiming uniform.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = NoRA(inner_rank=1).build(site, rank=4, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, Statistics(absmean=torch.ones(6)), torch.Generator().manual_seed(0))
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max())
        (8, 0.0)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"absmean"})

    inner_rank: int | None = None
    exponent: float = 0.5
    split: Split = "left"
    init: InnerStart = "zero"

    def __post_init__(self) -> None:
        if self.inner_rank is not None and self.inner_rank < 1:
            raise ValueError(f"inner_rank must be at least 1, not {self.inner_rank}; leave it out for r / 4")
        if not 0 <= self.exponent <= 2:
            raise ValueError(f"exponent must lie in [0, 2], not {self.exponent}; ASVD uses 0.5")
        self.check_choices(split=Split, init=InnerStart)

    def inner(self, rank: int) -> int:
        """r' at rank r."""
        return max(1, rank // 4) if self.inner_rank is None else self.inner_rank

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """B' and A' trained between frozen B and A."""
        return _NoRAAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """2 r r'."""
        return 2 * rank * self.inner(rank)

    def check(self, site: Site, rank: int) -> str | None:
        """As for every method, and inner_rank must be at most the rank."""
        if self.inner(rank) > rank:
            return f"gets rank {rank}, below inner_rank {self.inner(rank)}; raise the rank or lower inner_rank"
        return super().check(site, rank)


class _NoRAAdapter(LowRankAdapter):
    left: Tensor
    inner_left: Tensor
    inner_right: Tensor
    right: Tensor

    def __init__(self, method: NoRA, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.method = method
        self.scale = scale
        inner = method.inner(rank)
        self.buffer("left", site.out_features, rank)
        self.buffer("right", rank, site.in_features)
        self.parameter("inner_left", rank, inner)
        self.parameter("inner_right", inner, rank)

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        assert statistics is not None
        size = statistics.require("absmean").to(weight).pow(self.method.exponent)
        left, right = place_spectrum(*activation_aware_svd(weight, size, self.rank), self.method.split)
        self.fill(left=left, right=right)
        nn.init.kaiming_uniform_(self.inner_right, a=math.sqrt(5), generator=generator)
        if self.method.init == "zero":
            nn.init.zeros_(self.inner_left)
        else:
            nn.init.kaiming_uniform_(self.inner_left, a=math.sqrt(5), generator=generator)
        self.ready = True

    def update(self, x: Tensor) -> Tensor:
        z = self.site.expand(self.site.reduce(x, self.right), self.inner_right)
        return self.site.expand(self.site.expand(z, self.scale * self.inner_left), self.left)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Inner dimension r'."""
        return self.left @ (self.scale * self.inner_left), self.inner_right @ self.right
