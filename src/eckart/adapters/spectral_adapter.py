"""Spectral Adapter: move singular vectors of a weight, by adding to them or by rotating them.

    W = U diag(s) Vᵀ;   U_1 (out, r), s_1 (r,), V_1 (in, r) are r neighbouring triplets, the first ones unless asked
    additive:    y = x (W + (U_1 + c A_U) diag(s_1) (V_1 + c A_V)ᵀ - U_1 diag(s_1) V_1ᵀ)ᵀ,   A_U, A_V trained from 0
    rotational:  y = x (W + U_1 (Q_U diag(s_1) Q_Vᵀ - diag(s_1)) V_1ᵀ)ᵀ,   Q = cayley(c P),  P_U, P_V (r, r) from 0

F. Zhang, M. Pilanci, Spectral Adapter: Fine-Tuning in Spectral Space, NeurIPS 2024, arXiv 2405.13952; code:
pilancilab/spectral_adapter. With the trained numbers of LoRA, the additive change has twice its rank; the rotational
one has 2 r² numbers, and keeps all singular values of W.

Different here: the code builds the (out, in) matrix in every step and deletes the base layer; W stays whole, and the
change goes through 2 r (additive) or r (rotational) inner features. The code has no alpha; c = alpha / r multiplies
what is trained, and is 1 unless alpha is given. The paper's fusion of several concepts is to have their adapters active
or merged together, each with an ``offset`` of its own: their blocks of columns do not meet, so the changes add up.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg import svd
from ..linalg.transforms import cayley
from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .pissa import Solver
from .site import Site, SiteKind

__all__ = ["SpectralAdapter"]

Variant = Literal["additive", "rotational"]
Position = Literal["top", "bottom"]


@dataclass(frozen=True)
class SpectralAdapter(AdapterMethod):
    """Fine-tuning of singular vectors.

    Attributes:
        variant: "additive" (Spectral Adapter-A) or "rotational" (Spectral Adapter-R).
        position: The end of the spectrum from which triplets are counted: "top" or "bottom". The paper's ablation has
            the top in front.
        offset: How many triplets are left out from there. Concept i of a fusion takes ``i * r``: triplets i r to
            (i + 1) r, shared with no other.
        values: Whether the singular values are trained too, r numbers v from 0: s_1 + c v in the additive variant, s_1
            (1 + c v) in the rotational one. The code has them for diffusion models, the paper's text has not.
        solver: How the r leading triplets are found: "auto" (randomized where it pays, within 1 % of the best error),
            "randomized", or "exact", which keeps concept 0 of a fusion quite apart from the others. Further inside the
            spectrum they are always computed from all, good to 1e-8 s_1.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = SpectralAdapter(variant="rotational").build(site, rank=2, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator())
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max())
        (8, 0.0)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d", "embedding"})

    variant: Variant = "additive"
    position: Position = "top"
    offset: int = 0
    values: bool = False
    solver: Solver = "auto"

    def __post_init__(self) -> None:
        self.check_choices(variant=Variant, position=Position, solver=Solver)
        if self.offset < 0:
            raise ValueError(f"offset must be at least 0, not {self.offset}; count from the bottom with position")

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """The change of the singular vectors trained, from none."""
        return (_Additive if self.variant == "additive" else _Rotational)(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r (in + out) additive, 2 r² rotational; r more with ``values``."""
        each = site.in_features + site.out_features if self.variant == "additive" else 2 * rank
        return rank * (each + self.values)

    def check(self, site: Site, rank: int) -> str | None:
        """Also whether the triplets exist, and can be rotated."""
        problem = super().check(site, rank)
        if problem is None and self.offset + rank > site.largest_rank:
            return f"has {site.largest_rank} singular triplets, too few for offset {self.offset} and rank {rank}"
        if problem is None and self.variant == "rotational" and rank < 2:
            return "has nothing to rotate with rank 1; the rotational variant takes 2 or more"
        return problem


class _SpectralAdapter(Adapter):
    u: Tensor
    s: Tensor
    vh: Tensor
    values: Tensor

    def __init__(self, method: SpectralAdapter, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.method, self.scale = method, scale
        self.buffer("u", site.out_features, rank)
        self.buffer("s", rank)
        self.buffer("vh", rank, site.in_features)
        if method.values:
            self.parameter("values", rank)

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        method, r = self.method, self.rank
        first = method.offset if method.position == "top" else self.site.largest_rank - method.offset - r
        found = svd(weight, first + r, driver="gram" if first and method.solver != "exact" else method.solver)
        self.fill(u=found.u[:, first:], s=found.s[first:], vh=found.vh[first:])
        self.ready = True

    def update(self, x: Tensor) -> Tensor:
        left, right = self.low_rank()
        return self.site.expand(self.site.reduce(x, right), left)

    def delta(self, weight: Tensor) -> Tensor:
        left, right = self.low_rank()
        return left @ right

    @abstractmethod
    def low_rank(self) -> tuple[Tensor, Tensor]:
        """As in every adapter, but never None."""

    def _growth(self) -> Tensor:
        """c v (r,), zero where the singular values are not trained."""
        return self.scale * self.values if self.method.values else torch.zeros_like(self.s)


class _Additive(_SpectralAdapter):
    left: Tensor
    right: Tensor

    def __init__(self, method: SpectralAdapter, site: Site, rank: int, scale: float) -> None:
        super().__init__(method, site, rank, scale)
        self.parameter("left", site.out_features, rank)  # A_U
        self.parameter("right", rank, site.in_features)  # A_Vᵀ

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """A_U diag(s') V'ᵀ + U_1 (diag(s') V'ᵀ - diag(s_1) V_1ᵀ), the difference without cancellation."""
        shift, growth = self.scale * self.right, self._growth()[:, None]
        moved = self.vh + shift
        right = [(self.s[:, None] + growth) * moved, self.s[:, None] * shift + growth * moved]
        return torch.cat([self.scale * self.left, self.u], dim=1), torch.cat(right)


class _Rotational(_SpectralAdapter):
    left: Tensor
    right: Tensor

    def __init__(self, method: SpectralAdapter, site: Site, rank: int, scale: float) -> None:
        super().__init__(method, site, rank, scale)
        self.parameter("left", rank, rank)  # P_U
        self.parameter("right", rank, rank)  # P_V

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """U_1 times the change of the core, and V_1ᵀ."""
        grown = self.s * (1 + self._growth())
        core = cayley(self.scale * self.left) * grown @ cayley(self.scale * self.right).mT
        return self.u @ (core - torch.diag(self.s)), self.vh
