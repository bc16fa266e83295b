"""SORSA: PiSSA with singular values and vectors kept apart, and a penalty that keeps the vectors orthonormal.

    W = U diag(s) Vᵀ,   B_0 = U_r (out, r),   S_0 = s_r (r,),   A_0 = V_rᵀ (r, in),   all three trained
    y = x (W + c (B diag(S) A - B_0 diag(S_0) A_0))ᵀ
    loss + weight (||Bᵀ B - I||_F + ||A Aᵀ - I||_F) / 2, over all adapters

Y. Cao, Z. Song, SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language
Models, 2024, arXiv 2409.00055; code: Gunale0926/SORSA.

Different here: the penalty is a term of the loss, so it is clipped and scaled with it; the code adds its gradient after
clipping. The norm is sqrt(||.||² + δ²) - δ with δ = 1e-3: the plain one has a gradient of length 2 as soon as rounding
moves a factor off orthonormality, which is a push of full size in a random direction from the first step on. Nor is
B diag(S) A (out, in) formed, as the code does in each forward pass, and the SVD is in float32 whatever the weight is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg import svd
from ..models.calibrate import Statistics
from .contract import AdapterMethod
from .factored import FactoredAdapter
from .pissa import Solver
from .site import Site, SiteKind

__all__ = ["SORSA", "smooth_root", "squared_deviation"]

Form = Literal["sorsa", "squared", "none"]

_DELTA = 1e-3  # a hundred times the rounding of a float32 Gram matrix of r = 128, below any deviation that matters


def squared_deviation(factor: Tensor) -> Tensor:
    """||G - I||_F², G the smaller Gram matrix of a factor (out, r) or (r, in).

    Example:
        >>> float(squared_deviation(torch.tensor([[3.0, 0.0, 0.0]])))  # (9 - 1)²
        64.0
    """
    factor = factor if factor.shape[0] <= factor.shape[1] else factor.mT
    gram = factor @ factor.mT
    return (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().sum()


def smooth_root(square: Tensor) -> Tensor:
    """sqrt(square + δ²) - δ: a norm from its square, flat at zero; at most δ = 1e-3 below it."""
    return (square + _DELTA**2).sqrt() - _DELTA


@dataclass(frozen=True)
class SORSA(AdapterMethod):
    """Singular values and orthonormal regularized singular vectors adaptation.

    Attributes:
        form: The penalty: "sorsa" (norms, as in the paper), "squared" (their squares: a force in proportion to the
            deviation, which wants a larger weight) or "none".
        weight: Of the mean over the two factors, for each adapter. The paper multiplies the mean over the factors of
            all L adapted layers by gamma / eta, eta being the highest learning rate: that is gamma / (eta L) here. The
            default is its setting for LLaMA-2-7B: gamma 4e-4, eta 3e-5, L = 224.
        solver: How the r leading triplets are found: "auto" (randomized where it pays, within 1 % of the best error),
            "randomized", "lanczos" (to rounding, half the time of "exact"), or "exact". The start is exact with any of
            them: only the split differs.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = SORSA().build(site, rank=2, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator())
        >>> adapter.num_trainable(), float(adapter.penalty().detach()) < 1e-6
        (30, True)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d", "embedding"})

    form: Form = "sorsa"
    weight: float = 0.06
    solver: Solver = "auto"

    def __post_init__(self) -> None:
        self.check_choices(form=Form, solver=Solver)
        if not self.weight >= 0:
            raise ValueError(f"weight must not be negative, not {self.weight}; 0 is the same as form='none'")

    def build(self, site: Site, rank: int, scale: float) -> FactoredAdapter:
        """B, S and A trained, their start remembered."""
        return _SORSAAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r (in + out + 1)."""
        return rank * (site.in_features + site.out_features + 1)


class _SORSAAdapter(FactoredAdapter):
    def __init__(self, method: SORSA, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank, trained=("left", "core", "right"), core="diagonal", anchored=True, scale=scale)
        self.method = method

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        top = svd(weight, self.rank, driver=self.method.solver)
        self.set_factors(left=top.u, core=top.s, right=top.vh)

    def penalty(self) -> Tensor | None:
        if self.method.form == "none" or self.method.weight == 0:
            return None
        with torch.autocast(self.left.device.type, enabled=False):  # half precision would see deviations of its own
            squares = torch.stack([squared_deviation(self.left), squared_deviation(self.right)])
            return self.method.weight * (squares if self.method.form == "squared" else smooth_root(squares)).mean()
