"""CorDA: train the part of a weight that its inputs use most, or the part they use least.

    C' = C + damping I (in, in),   C = E[x xᵀ] over its mean diagonal,   W C' = U diag(s) Vᵀ,   V̂ = C'^-1 V
    B_0 = U_r diag(s_r / c)^½ (out, r),   A_0 = diag(s_r / c)^½ V̂_rᵀ (r, in),   y = x (W + c (B A - B_0 A_0))ᵀ

"ipm" (instruction-previewed) takes the first r triplets, the inputs being those of the new task; "kpm" (knowledge-
preserved) the last r, the inputs being those of what is to be remembered.

Y. Yang, X. Li, Z. Zhou, S. L. Song, J. Wu, L. Nie, B. Ghanem, CorDA: Context-Oriented Decomposition Adaptation of Large
Language Models for Task-Aware Parameter-Efficient Fine-tuning, NeurIPS 2024, arXiv 2406.05223; code: iboing/CorDA, and
PEFT (``init_lora_weights="corda"``).

Different here: nothing is inverted, since diag(s) V̂ᵀ = Uᵀ W. Work is in float64, where C' with the paper's damping is
safely conditioned (at most in / damping + 1), so the damping is never doubled as in the code, whose float32 inverses
can fail. The code's scale of C (inputs over their maximum, summed over each sample) moves a common factor between B and
A and nothing else; with the mean diagonal for unit, C = I gives PiSSA ("ipm") and MiLoRA ("kpm"). Padding does not
count, any batch size will do, and biases are not trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg import SVD, svd, whiten
from ..models.calibrate import Statistics
from .contract import AdapterMethod
from .factored import FactoredAdapter
from .site import Site

__all__ = ["CorDA", "context_oriented_svd"]

Mode = Literal["ipm", "kpm"]
SigmaFuse = Literal["UV", "U", "V"]


def context_oriented_svd(
    weight: Tensor, gram: Tensor, rank: int | None = None, *, damping: float = 0.01, power: float = 1.0
) -> SVD:
    """The SVD of a weight seen by its inputs; ``u.mT @ weight`` is diag(s) V̂ᵀ.

        weight (gram / mean diag + damping I)^power = u diag(s) vh

    At power ½ vh belongs to the Cholesky factor in place of the symmetric root; u and s are the same for both.

    Args:
        weight: (out, in).
        gram: (in, in), sum of x xᵀ; its scale does not matter.
        rank: How many leading triplets; None for all.
        damping: In units of the mean diagonal of the Gram matrix, above 0.
        power: 1, or 0.5 for the least error of the output.

    Returns:
        float64 factors, to 1e-10 of the first singular value; all of them to rounding.

    Raises:
        ValueError: The Gram matrix is zero.
    """
    mean = gram.diagonal().mean()
    if not mean > 0:
        raise ValueError("calibration saw no input but zeros; give data that reaches this layer, or exclude it")
    context = gram / mean
    context.diagonal().add_(damping)
    if power != 1:
        context = whiten(context, form="cholesky", shrinkage=0).factor
    return svd(weight.double() @ context, rank, driver="exact" if rank is None else "lanczos")


@dataclass(frozen=True)
class CorDA(AdapterMethod):
    """Context-oriented decomposition adaptation.

    Attributes:
        mode: "ipm": the r largest components, to learn the task of the data fast. "kpm": the r smallest, to keep what
            the data is about; needs the whole SVD, O(out in min(out, in)).
        damping: What is added to the diagonal of C, in units of its mean.
        power: 1 as in the paper: W C. 0.5: W C^½, whose leading part is the best for the output, min ||(W - W') X||_F.
        sigma_fuse: Where the singular values go: "UV" half to B and half to A, "U" all to B, "V" all to A.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = CorDA(mode="kpm").build(site, rank=2, scale=1.0)
        >>> weight, x = (torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (8, 50))
        >>> adapter.initialize(weight, Statistics(count=50, gram=(x.mT @ x).double()), torch.Generator())
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max()) < 1e-6
        (28, True)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    mode: Mode = "ipm"
    damping: float = 0.01
    power: float = 1.0
    sigma_fuse: SigmaFuse = "UV"

    def __post_init__(self) -> None:
        self.check_choices(mode=Mode)
        self.check_choices(sigma_fuse=SigmaFuse)
        if self.power not in (0.5, 1):
            raise ValueError(f"power must be 1 (the paper's) or 0.5 (best for the output), not {self.power}")
        if not 0 < self.damping < math.inf:
            raise ValueError(f"damping must be a positive number, not {self.damping}; the paper's is 0.01")

    def build(self, site: Site, rank: int, scale: float) -> FactoredAdapter:
        """B and A trained, their start remembered."""
        return _CorDAAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r (in + out)."""
        return rank * (site.in_features + site.out_features)


class _CorDAAdapter(FactoredAdapter):
    def __init__(self, method: CorDA, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank, trained=("left", "right"), anchored=True, scale=scale)
        self.method = method

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        assert statistics is not None
        method, r = self.method, self.rank
        gram = statistics.require("gram").to(weight.device, torch.float64)
        found = context_oriented_svd(
            weight, gram, r if method.mode == "ipm" else None, damping=method.damping, power=method.power
        )
        u, s = (found.u[:, :r], found.s[:r]) if method.mode == "ipm" else (found.u[:, -r:], found.s[-r:])
        # Where W has no more rank uᵀ W vanishes, and B must not. Elsewhere B A is right whatever the value.
        s = s.clamp(min=torch.finfo(torch.float32).eps * float(found.s[0]) or 1.0) / self.scale
        share = {"UV": s.sqrt(), "U": s, "V": torch.ones_like(s)}[method.sigma_fuse]
        self.set_factors(left=u * share, right=(u / (share * self.scale)).mT @ weight.double())
