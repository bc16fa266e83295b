"""SpectralFT: low-rank corrections of the principal singular vectors of a weight.

    W = U_p diag(s_p) V_pᵀ + W_m,   U_p (out, k), s_p (k,), V_p (in, k) the k leading triplets, W_m the minor part
    y = x ((U_p + D_U) diag(s_p) (V_p + D_V)ᵀ + W_m)ᵀ,   D_U = c A_U B_U,  D_Vᵀ = c A_V B_V
    A_U (out, q), A_V (k, q) from Kaiming uniform;   B_U (q, k), B_V (q, in) from 0

Z. Li, M.-W. Mak, M. Pilanci, H. Lee, H. Meng, Spectral-Aware Low-Rank Adaptation for Speaker Verification, ICASSP 2025,
arXiv 2501.03829; code: lizhepolyu/SpectralFT. The configuration's rank is k. It is Spectral Adapter with D_U and D_V of
rank q, so a layer has q (in + out + 2 k) trained numbers.

Different here: the released code copies the new weight into the layer outside of the graph, so no gradient reaches A
and B; it leaves W_m out, so layers have rank k from the start (``keep_minor=False``); its A_U fits square weights only.
Nothing of size (out, in) is built here: the change has rank 2 q, and goes through as many inner features. The code has
no alpha; c = alpha / k is 1 unless alpha is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..linalg import svd
from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .pissa import Solver
from .site import Site, SiteKind

__all__ = ["SpectralFT"]

_RATIO = 16  # k / q in the paper: 256 and 16


@dataclass(frozen=True)
class SpectralFT(AdapterMethod):
    """Spectral-aware low-rank adaptation.

    Attributes:
        q: Rank of the corrections, at most k. None for k / 16, at least 1: the paper has k = 256 of 1024 and q = 16.
        keep_minor: Whether W_m stays. Without it, as in the released code, the layer starts as the best approximation
            of rank k of itself.
        solver: How the k leading triplets are found: "auto" (randomized where it pays, within 1 % of the best error),
            "randomized", "lanczos" (to rounding, half the time of "exact"), or "exact".

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = SpectralFT(q=1).build(site, rank=3, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator().manual_seed(0))
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max())
        (20, 0.0)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d"})

    q: int | None = None
    keep_minor: bool = True
    solver: Solver = "auto"

    def __post_init__(self) -> None:
        if self.q is not None and self.q < 1:
            raise ValueError(f"q must be at least 1, not {self.q}; None is a sixteenth of the rank")
        self.check_choices(solver=Solver)

    def correction_rank(self, rank: int) -> int:
        """q for k = ``rank``."""
        return self.q or max(1, rank // _RATIO)

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """Both corrections trained, from none."""
        return _SpectralFTAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """q (in + out + 2 k)."""
        return self.correction_rank(rank) * (site.in_features + site.out_features + 2 * rank)

    def check(self, site: Site, rank: int) -> str | None:
        """Also whether q is a low rank among k vectors."""
        problem = super().check(site, rank)
        if problem is None and self.correction_rank(rank) > rank:
            return f"would correct {rank} singular vectors with rank q = {self.q}; q must be at most the rank"
        return problem


class _SpectralFTAdapter(Adapter):
    u: Tensor
    s: Tensor
    vh: Tensor
    left_outer: Tensor
    left_inner: Tensor
    right_inner: Tensor
    right_outer: Tensor

    def __init__(self, method: SpectralFT, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.method, self.scale = method, scale
        q = method.correction_rank(rank)
        self.buffer("u", site.out_features, rank)
        self.buffer("s", rank)
        self.buffer("vh", rank, site.in_features)
        self.parameter("left_outer", site.out_features, q)  # A_U
        self.parameter("left_inner", q, rank)  # B_U
        self.parameter("right_inner", rank, q)  # A_V
        self.parameter("right_outer", q, site.in_features)  # B_V

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        top = svd(weight, self.rank, driver=self.method.solver)
        start = [torch.empty(part.shape) for part in (self.left_outer, self.right_inner)]
        for part in start:
            nn.init.kaiming_uniform_(part, generator=generator)
        self.fill(u=top.u, s=top.s, vh=top.vh, left_outer=start[0], right_inner=start[1])
        self.ready = True

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        if self.method.keep_minor:
            return super().forward(x, base)
        y = base(torch.zeros_like(x))  # the bias
        left, right = self._change()
        z = self.site.reduce(x.to(torch.float32), torch.cat([self.vh, right]))
        return y + self.site.expand(z, torch.cat([self.u * self.s, left], dim=1)).to(y.dtype)

    def update(self, x: Tensor) -> Tensor:
        left, right = self._change()
        return self.site.expand(self.site.reduce(x, right), left)

    def delta(self, weight: Tensor) -> Tensor:
        left, right = self._change()
        change = left @ right
        return change if self.method.keep_minor else change + (self.u * self.s) @ self.vh - weight

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        return self._change() if self.method.keep_minor else None

    def _change(self) -> tuple[Tensor, Tensor]:
        """D_U diag(s) (V + D_V)ᵀ + U diag(s) D_Vᵀ as factors of rank 2 q."""
        inner = self.scale * self.right_inner
        moved = self.vh + inner @ self.right_outer
        left = torch.cat([self.scale * self.left_outer, self.u @ (self.s[:, None] * inner)], dim=1)
        return left, torch.cat([(self.left_inner * self.s) @ moved, self.right_outer])
