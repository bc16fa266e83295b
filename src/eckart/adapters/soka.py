"""SoKA: train the leading Kronecker products of a weight: fewer numbers than a low-rank term, and of high rank.

    W ≈ sum over i <= k of s_i U_i ⊗ V_i,   U_i (m_1, n_1), V_i (m_2, n_2),   out = m_1 m_2, in = n_1 n_2
    A_i = (s_i / c)^½ U_i,  B_i = (s_i / c)^½ V_i,   y = x (W + c sum_i (A_i ⊗ B_i - A_i0 ⊗ B_i0))ᵀ
    k = min(r, energy, elbow),   energy: least k with s_1^2 + ... + s_k^2 >= τ ||W||_F^2

U ⊗ V maps a row x, as an n_1 x n_2 matrix X, to U X Vᵀ: two small products, no Kronecker product is formed. The rank of
U ⊗ V is rank(U) rank(V). Few numbers are not few multiplications: with 64 x 64 factors a term stores as much as one
rank of LoRA and costs 64 times as much, and 16 terms with their start as much as the layer itself.

Y. H. Chong, P. Qu, Singular Value Decomposition on Kronecker Adaptation for Large Language Model, 2025, arXiv
2506.15251; no code. Written from the abstract and a summary of the algorithm, which name the two criteria for k but
neither their formulas nor τ nor how sizes are split. Here the elbow is the point farthest below the chord of the first
r values, τ is 0.9, and the split is the one with the fewest numbers in a term (64 x 64 twice for 4096 x 4096) of those
that are no plain low-rank term. The summary's reshape of W, read literally, does not give Kronecker factors: this is
Van Loan's rearrangement. The rank r is the largest number of terms. PEFT's LoKr is one product with a random start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linalg import elbow_rank
from ..linalg.tensors import KroneckerSVD, kronecker_shapes, kronecker_svd
from ..models.calibrate import Statistics
from ..models.parallel import parallel_map
from .contract import Adapter, AdapterMethod
from .site import Site

__all__ = ["SoKA", "kronecker_terms"]

Init = Literal["weight", "zero"]


def kronecker_terms(s: Tensor, error: float, energy: float) -> int:
    """How many terms are worth training: the smaller of the energy's and the elbow's answer, at least 1.

        min k with  s_1^2 + ... + s_k^2 >= energy * (sum s_i^2 + error^2)

    Args:
        s: (r,) leading weights of a Kronecker SVD.
        error: What they leave out, Frobenius norm.
        energy: τ, in (0, 1].

    Example:
        >>> kronecker_terms(torch.tensor([9.0, 8.0, 1.0, 0.5]), error=2.0, energy=0.95)
        2
    """
    energies = s.double().square().cumsum(0)
    enough = int((energies < energy * (energies[-1] + error**2)).sum()) + 1
    return max(1, min(enough, elbow_rank(s), s.numel()))


@dataclass(frozen=True)
class SoKA(AdapterMethod):
    """Kronecker adaptation from the SVD.

    Attributes:
        dynamic: Choose the number of terms of each layer by its spectrum, r being the most; else r everywhere.
        energy: τ, the share of the squared norm that the terms must hold. The paper does not say which.
        init: "weight": A and B from the weight. "zero": A from the weight and B zero, as in LoRA.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = SoKA().build(site, rank=2, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator())
        >>> adapter.left.shape, adapter.right.shape, float(adapter.delta(weight).detach().abs().max()) < 1e-6
        (torch.Size([2, 4, 2]), torch.Size([2, 2, 3]), True)
    """

    dynamic: bool = True
    energy: float = 0.9
    init: Init = "weight"

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy is a share of the squared norm, above 0 and at most 1, not {self.energy}")
        self.check_choices(init=Init)

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """A and B of every term trained, their start remembered."""
        return _SoKAAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r (m_1 n_1 + m_2 n_2)."""
        shape = _shape(site)
        assert shape is not None
        first = shape[0] * shape[1]
        return rank * (first + site.out_features * site.in_features // first)

    def check(self, site: Site, rank: int) -> str | None:
        """Also whether its sizes can be split, and into factors with so many terms."""
        problem, shape = super().check(site, rank), _shape(site)
        if problem:
            return problem
        if shape is None:
            sizes = f"{site.out_features} x {site.in_features}"
            return f"is {sizes}, so its Kronecker products are ordinary low-rank terms; use pissa there, or exclude it"
        first = shape[0] * shape[1]
        most = min(first, site.out_features * site.in_features // first)
        if rank > most:
            return f"is a sum of {most} Kronecker products, so its rank must be 1 to {most}, not {rank}"
        return None

    def ranks(
        self,
        sites: Mapping[str, Site],
        statistics: Mapping[str, Statistics],
        rank: int,
        weight: Callable[[str], Tensor],
    ) -> dict[str, int] | None:
        """The number of terms of each layer by `kronecker_terms`, at most ``rank``."""
        if not self.dynamic:
            return None

        def terms(name: str) -> int:
            found = kronecker_svd(weight(name), rank, _shape(sites[name]))
            return kronecker_terms(found.s, float(found.error), self.energy)

        names = list(sites)
        counts = parallel_map(terms, names, cost=lambda name: float(sites[name].out_features * sites[name].in_features))
        return dict(zip(names, counts, strict=True))


class _SoKAAdapter(Adapter):
    left: Tensor
    right: Tensor
    left_start: Tensor
    right_start: Tensor

    def __init__(self, method: SoKA, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.method, self.scale = method, scale
        shape = _shape(site)
        assert shape is not None
        self.shape = shape
        shapes = {"left": shape, "right": (site.out_features // shape[0], site.in_features // shape[1])}
        for name, sizes in shapes.items():
            self.parameter(name, rank, *sizes)
            if method.init == "weight":
                self.buffer(f"{name}_start", rank, *sizes)

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        top = kronecker_svd(weight, self.rank, self.shape)
        root = (top.s.clamp(min=0) / self.scale).sqrt()[:, None, None]
        left, right = top.left * root, top.right * root
        if self.method.init == "weight":
            self.fill(left=left, right=right, left_start=left, right_start=right)
        else:
            self.fill(left=left, right=torch.zeros_like(right))
        self.ready = True

    def update(self, x: Tensor) -> Tensor:
        """Term by term, or by Δ as a whole where that is fewer multiplications: for many terms or tokens it is."""
        terms, (m1, n1) = self._terms(), self.shape
        m2, n2 = self.site.out_features // m1, self.site.in_features // n1
        tokens, rank = x.numel() // self.site.in_features, len(terms.left)
        apart = tokens * rank * min(n1 * m2 * (n2 + m1), n2 * m1 * (n1 + m2))
        if apart <= (tokens + rank) * self.site.out_features * self.site.in_features:
            return terms.apply(x)
        return F.linear(x, terms.reconstruct())

    def delta(self, weight: Tensor) -> Tensor:
        return self._terms().reconstruct()

    def _terms(self) -> KroneckerSVD:
        """Δ as one sum, of 2 r terms where the start is taken off."""
        left, right = self.left, self.right
        weights = left.new_full((self.rank,), self.scale)
        if self.method.init == "weight":
            left, right = torch.cat([left, self.left_start]), torch.cat([right, self.right_start])
            weights = torch.cat([weights, -weights])
        return KroneckerSVD(left, weights, right, weights.new_zeros(()))


def _shape(site: Site) -> tuple[int, int] | None:
    """(m_1, n_1) with the fewest numbers in a term, an ordinary low-rank term left out."""
    m, n = site.out_features, site.in_features
    return next((shape for shape in kronecker_shapes(m, n) if shape not in ((m, 1), (1, n))), None)
