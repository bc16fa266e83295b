"""Effort: freeze all but the last few singular components of a weight, and train the vectors and values of those.

    W = U diag(s) Vᵀ = W_main + U_m diag(s_m) V_mᵀ,   m the r smallest, U_m (out, r), V_mᵀ (r, in)
    y = x (W_main + c B diag(d) A)ᵀ,   B, d and A trained from U_m, s_m / c and V_mᵀ
    loss + orthogonality Σ (||B̃ᵀ B̃ - I||_F + ||Ã Ãᵀ - I||_F) / 2 + norm Σ | ||W_main + c B diag(d) A||_F² - ||W||_F² |

with B̃ = [U_rest, B] (out, n) and Ã = [V_rest; A] (n, in), n = min(out, in), and sums over adapters. The paper trains
one component, ``rank=1`` (1023 frozen ones of 1024), on the attention layers of a CLIP vision tower.

Z. Yan, J. Wang, P. Jin, K. Zhang, C. Liu, S. Chen, T. Yao, S. Ding, B. Wu, L. Yuan, Orthogonal Subspace Decomposition
for Generalizable AI-Generated Image Detection, ICML 2025, arXiv 2411.15633; code: YZY-stack/Effort-AIGI-Detection.

The penalties are the paper's, but commented out in the released trainer that its numbers come from. They are off by
default here: ``norm`` needs W_main, which the adapter then carries. No Gram matrix is formed: ||B̃ᵀ B̃ - I||² =
2 ||U_restᵀ B||² + ||Bᵀ B - I||², and where U is square U_restᵀ B has the norm of B - U_m U_mᵀ B. For the longer side of
a weight that is not square the adapter carries V_rest (or U_rest). For out > n the authors' B̃ B̃ᵀ (out, out) adds the
constant out - n under the root, which is left out. The norms are flattened at zero as in SORSA.

A weight decay pulls the trained component to zero, out of the weight, rather than to its start: leave it at 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg import svd
from ..models.calibrate import Statistics
from .contract import AdapterMethod
from .factored import FactoredAdapter
from .site import Site, SiteKind
from .sorsa import smooth_root, squared_deviation

__all__ = ["Effort"]


@dataclass(frozen=True)
class Effort(AdapterMethod):
    """Orthogonal subspace decomposition.

    Attributes:
        orthogonality: Weight of the orthogonality to the frozen components, for each adapter. The paper's 1 times the
            mean over the L adapted layers is 1 / L. For a weight that is not square the adapter then grows by the
            longer side's frozen vectors, about as many numbers as the weight has.
        norm: Weight of the change of ||W||_F², for each adapter; the paper's is 1 / L. The adapter then grows by a copy
            of the weight.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = Effort(orthogonality=0.1).build(site, rank=1, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator())
        >>> adapter.num_trainable(), float(adapter.penalty().detach()) < 1e-6
        (15, True)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d", "embedding"})

    orthogonality: float = 0.0
    norm: float = 0.0

    def __post_init__(self) -> None:
        for name in ("orthogonality", "norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}; 0 leaves the penalty out")

    def build(self, site: Site, rank: int, scale: float) -> FactoredAdapter:
        """B, d and A trained, their start remembered."""
        return _EffortAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r (in + out + 1)."""
        return rank * (site.in_features + site.out_features + 1)


class _EffortAdapter(FactoredAdapter):
    left_start: Tensor
    core_start: Tensor
    right_start: Tensor
    main: Tensor
    frozen: Tensor

    def __init__(self, method: Effort, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank, trained=("left", "core", "right"), core="diagonal", anchored=True, scale=scale)
        self.method = method
        self.longer = max(site.out_features, site.in_features)
        self.square = site.out_features == site.in_features
        if method.norm:
            self.buffer("main", site.out_features, site.in_features)
        if method.orthogonality and not self.square:
            self.buffer("frozen", site.largest_rank - rank, self.longer)

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        full = svd(weight, driver="gram")  # of all triplets the last ones are exact to 1e-8 of the largest
        u, s, vh = full.u[:, -self.rank :], full.s[-self.rank :], full.vh[-self.rank :]
        self.set_factors(left=u, core=s / self.scale, right=vh)
        if self.method.norm:
            self.fill(main=weight - (u * s) @ vh)
        if self.method.orthogonality and not self.square:
            longer = full.u.mT if self.site.out_features == self.longer else full.vh
            self.fill(frozen=longer[: -self.rank])

    def penalty(self) -> Tensor | None:
        method = self.method
        if method.orthogonality == method.norm == 0:
            return None
        total = self.core.new_zeros(())
        with torch.autocast(self.left.device.type, enabled=False):  # half precision would see deviations of its own
            if method.orthogonality:
                sides = (self.left.mT, self.left_start.mT), (self.right, self.right_start)
                squares = torch.stack([2 * self._leak(*side) + squared_deviation(side[0]) for side in sides])
                total = total + method.orthogonality * smooth_root(squares).mean()
            if method.norm:
                total = total + method.norm * smooth_root(self._gained_energy().square())
        return total

    def _leak(self, vectors: Tensor, start: Tensor) -> Tensor:
        """Squared norm of the part of vectors (r, length) that lies in the span of the frozen ones."""
        if not self.square and vectors.shape[1] == self.longer:
            return (vectors @ self.frozen.mT).square().sum()
        return (vectors - vectors @ start.mT @ start).square().sum()

    def _gained_energy(self) -> Tensor:
        """||W_main + c B diag(d) A||² - ||W||², without the difference of two large numbers."""
        d = self.scale * self.core
        cross = (self.left * (self.main @ self.right.mT)).sum(dim=0) @ d
        energy = d @ ((self.left.mT @ self.left) * (self.right @ self.right.mT)) @ d
        return 2 * cross + energy - (self.scale * self.core_start).square().sum()
