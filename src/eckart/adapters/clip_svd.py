"""CLIP-SVD: train all singular values of every layer, and nothing else.

    W = U diag(s) Vᵀ,   y = x (W + c U diag(z - s) Vᵀ)ᵀ,   U (out, n), V (in, n); only z (n,) trained, n = min(out, in)

T. Koleilat, H. Rivaz, Y. Xiao, Singular Value Few-shot Adaptation of Vision-Language Models, 2025, arXiv 2509.03740;
code: HealthX-Lab/CLIP-SVD. For few-shot classification with CLIP. It is SVFit with nothing left out: ``ratio=1`` gives
every layer the rank min(out, in). Without it the configuration's rank limits how many values are trained, the largest.

Different here: the code puts U diag(z) Vᵀ in the place of W, and drops the last singular values down to a multiple of
4; the base stays whole, the change is added, and nothing is dropped. The code splits CLIP's fused attention weights
first; a fused matrix has n singular values here, not 3 n. As in the code, nothing keeps z positive or in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..models.calibrate import Statistics
from .contract import AdapterMethod
from .site import Site, SiteKind
from .svfit import SingularValueAdapter, Trained

__all__ = ["CLIPSVD"]


@dataclass(frozen=True)
class CLIPSVD(AdapterMethod):
    """Few-shot adaptation by singular values.

    Attributes:
        ratio: Where given, every layer trains this share of its singular values, the largest ones, at least one, in
            place of the configuration's rank; the paper's is 1, all of them.
        trained: The numbers that the optimizer sees: "value" z, as in the paper; "shift" z - s; "multiplier" z / s - 1.
            The start is the same. Weight decay (0.01 in the paper's code) pulls z to 0 with "value", and to s with the
            others.

    Example:
        >>> import torch
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = CLIPSVD().build(site, rank=6, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator())
        >>> adapter.num_trainable(), float(adapter.energy), float(adapter.delta(weight).detach().abs().max())
        (6, 1.0, 0.0)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d", "embedding"})

    ratio: float | None = None
    trained: Trained = "value"

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is a share of the singular values, above 0 and at most 1, not {self.ratio}")
        self.check_choices(trained=Trained)

    def build(self, site: Site, rank: int, scale: float) -> SingularValueAdapter:
        """z trained between frozen singular vectors."""
        return SingularValueAdapter(site, rank, scale, trained=self.trained, solver="auto")

    def trainable(self, site: Site, rank: int) -> int:
        """r, which is min(out, in) with ``ratio=1``."""
        return rank

    def check(self, site: Site, rank: int) -> str | None:
        """The configuration's rank need not fit where ``ratio`` takes its place."""
        return super().check(site, rank if self.ratio is None else min(rank, site.largest_rank))

    def ranks(
        self,
        sites: Mapping[str, Site],
        statistics: Mapping[str, Statistics],
        rank: int,
        weight: Callable[[str], Tensor],
    ) -> dict[str, int] | None:
        """``ratio`` of each layer's min(out, in)."""
        if self.ratio is None:
            return None
        return {name: max(1, int(self.ratio * site.largest_rank)) for name, site in sites.items()}
