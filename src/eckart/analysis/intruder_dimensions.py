"""Intruder dimensions: leading directions of a fine-tuned weight that resemble no direction of the pre-trained one.

    W0 (m, n) = U0 S0 V0ᵀ,   W = W0 + ΔW = U S Vᵀ,   q = min(m, n)
    c_j = max over all i of |u_jᵀ u0_i|,   j an intruder if j < k and c_j < ε
    published mitigation:  W_new = W + (λ - 1) sum over the intruders of s_j u_j v_jᵀ

λ = 1 changes nothing and λ = 0 removes the intruders. (PEFT's ``mitigation_lambda`` is this λ, so that larger means
LESS is removed; its docstring says the opposite.) Adapters are merged first: the question is about W, not ΔW.

Different here: only the k leading triplets of W are computed, and U0 is never formed, yet the maximum runs over all of
it: restricted to its leading part, a direction that only fell in rank would be flagged. Directions of singular values
that both weights do not have are no directions and do not count. Beside c_j stands a robust variant, since vectors of
almost equal singular values are arbitrary up to rotation: the norm of the projection of u_j on the span of all u0_l
with |s0_l - s0_i| <= near s0_i, at its largest i. And beside the threshold stands what a random direction reaches,
about √(2 ln q / m), because for a short left side (the keys of grouped-query attention) ε = 0.5 says nothing.

R. Shuttleworth, J. Andreas, A. Torralba and P. Sharma, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", NeurIPS
2025, arXiv:2410.21228 (2024); code: reeceshuttle/intruder-dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..linalg import SingularBasis, svd
from ..models.adapted import adapted_linears
from ..models.pairs import Pair, map_pairs, pair
from .contract import Analysis, AnalysisMethod, Subject

__all__ = ["IntruderDimensions", "Leading", "correction", "leading", "random_cosine"]


class Leading(NamedTuple):
    """The leading directions of a fine-tuned weight, and how near each is to one of the pre-trained weight.

    Attributes:
        u, s, vh: (m, k), (k,), (k, n) float64, triplets of W with singular values above rounding.
        cosines: (k,) c_j.
        robust: (k,) the robust variant, at least c_j.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    cosines: Tensor
    robust: Tensor

    def intruders(self, threshold: float, *, robust: bool = False) -> Tensor:
        """Indices of those below the threshold."""
        return torch.nonzero((self.robust if robust else self.cosines) < threshold).squeeze(1)


def leading(weight: Tensor, basis: SingularBasis, top: int = 10, near: float = 1e-3) -> Leading:
    """The ``top`` leading triplets of W with their cosines.

    Args:
        weight: W (m, n), any float dtype.
        basis: Of W0 (m, n).
        top: k.
        near: Relative distance up to which pre-trained singular values count as equal, for the robust variant.

    Returns:
        At most ``top`` triplets: as many as W has directions.

    Raises:
        LinalgError: NaN or Inf in a weight.

    Example:
        >>> w0 = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
        >>> w = w0.clone()
        >>> w[3, 0] = 9.0  # a left direction that w0 does not have
        >>> [round(c, 2) for c in leading(w, SingularBasis(w0), top=2).cosines.tolist()]
        [0.32, 1.0]
    """
    found = svd(weight.to(torch.float64), top, driver="gram")
    rank = int((found.s > max(weight.shape) * torch.finfo(torch.float32).eps * found.s[:1]).sum())
    u, s, vh = found.u[:, :rank], found.s[:rank], found.vh[:rank]
    products, values = basis.left_products(u).abs().clamp(max=1), basis.values
    if not basis.rank:
        return Leading(u, s, vh, torch.zeros_like(s), torch.zeros_like(s))
    # The values descend, so the span of the near ones is a window [first, end) for every i.
    first = torch.searchsorted(-values, -values * (1 + near))
    end = torch.searchsorted(-values, -values * (1 - near), right=True)
    sums = torch.nn.functional.pad(products.square().cumsum(dim=1), (1, 0))
    robust = (sums[:, end] - sums[:, first]).amax(dim=1).clamp(min=0, max=1).sqrt()
    cosines = products.amax(dim=1)
    return Leading(u, s, vh, cosines, torch.maximum(robust, cosines))


def correction(found: Leading, threshold: float = 0.5, scale: float = 0.75) -> tuple[Tensor, Tensor]:
    """The mitigation in factors: W_new = W + left right.

    Args:
        found: Of `leading`.
        threshold: ε.
        scale: λ: 1 changes nothing, 0 removes the intruders, above 1 amplifies them.

    Returns:
        left (m, i) and right (i, n) float64 for i intruders; ||left right||_F = |1 - λ| (sum s_j^2)^(1/2).

    Example:
        >>> w0 = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
        >>> w = w0.clone()
        >>> w[3, 0] = 9.0
        >>> left, right = correction(leading(w, SingularBasis(w0), top=2), scale=0.0)
        >>> [round(s, 2) + 0.0 for s in torch.linalg.svdvals(w + left @ right).tolist()]
        [2.0, 1.0, 0.0, 0.0]
    """
    chosen = found.intruders(threshold)
    return found.u[:, chosen] * (found.s[chosen] * (scale - 1)), found.vh[chosen]


def random_cosine(shape: tuple[int, int]) -> float:
    """About what max_i |u·u0_i| is for a random direction u: √(2 ln q / m), at most 1.

    Example:
        >>> round(random_cosine((768, 768)), 2), round(random_cosine((16, 64)), 2)
        (0.13, 0.59)
    """
    m, n = shape
    return min(1.0, math.sqrt(2 * math.log(max(min(m, n), 2)) / m))


@dataclass(frozen=True)
class IntruderDimensions(AnalysisMethod):
    """Count of intruder dimensions per weight.

    Args:
        top: k, how many leading directions of each fine-tuned weight are looked at.
        threshold: ε, the cosine below which one is an intruder.
        sweep: Further thresholds that are counted for.
        near: Relative distance up to which singular values count as equal, for the robust variant.

    Raises:
        ValueError: top below 1, near not in [0, 1), a threshold not in (0, 1].

    Example:
        >>> from eckart import catalog
        >>> catalog.get("intruder-dimensions").load()(top=5).top
        5
    """

    needs: ClassVar[frozenset[str]] = frozenset({"base"})

    top: int = 10
    threshold: float = 0.5
    sweep: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    near: float = 1e-3

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"top must be at least 1, not {self.top}")
        if not 0 <= self.near < 1:
            raise ValueError(f"near must be from 0 to below 1, not {self.near}")
        for value in (self.threshold, *self.sweep):
            if not 0 < value <= 1:
                raise ValueError(f"a threshold is a cosine above 0 and at most 1, not {value}")

    def analyze(self, subject: Subject) -> Analysis:
        """One row a weight; the figures are sums over the weights."""
        assert subject.base is not None
        pairs = pair(adapted_linears(subject.base, subject.where), adapted_linears(subject.model, subject.where))
        found = map_pairs(self._look, pairs, "intruder dimensions", progress=subject.progress)
        rows = [self._row(one, seen) for one, seen in zip(pairs, found, strict=True)]
        counts = [sum(row["counts"][index] for row in rows) for index in range(len(self.sweep))]
        totals = {name: sum(row[name] for row in rows) for name in ("intruders", "robust intruders")}
        figures = {"weights": len(rows), "directions": sum(len(row["cosines"]) for row in rows), **totals}
        analysis = Analysis({**figures, "thresholds": list(self.sweep), "counts": counts}, rows)
        analysis.tensors = {one.name: seen.cosines for one, seen in zip(pairs, found, strict=True)}
        analysis.warnings = self.blind_spots({row["layer"]: row["random cosine"] for row in rows})
        return analysis

    def blind_spots(self, random: Mapping[str, float]) -> list[str]:
        """What to warn of where a random direction, with the cosine given by layer, passes for a known one."""
        blind = [name for name, cosine in random.items() if cosine >= self.threshold]
        if not blind:
            return []
        return [
            f"{len(blind)} weights, such as {blind[0]}, are so short that a random direction reaches a cosine of "
            f"{self.threshold}: no intruder shows there"
        ]

    def _look(self, one: Pair) -> Leading:
        base, weight = one.read()
        return leading(weight, SingularBasis(base), self.top, self.near)

    def _row(self, one: Pair, found: Leading) -> dict[str, Any]:
        return {
            "layer": one.name,
            "rows": one.shape[0],
            "columns": one.shape[1],
            "intruders": len(found.intruders(self.threshold)),
            "robust intruders": len(found.intruders(self.threshold, robust=True)),
            "random cosine": random_cosine(one.shape),
            "counts": [len(found.intruders(threshold)) for threshold in self.sweep],
            "cosines": found.cosines.tolist(),
        }
