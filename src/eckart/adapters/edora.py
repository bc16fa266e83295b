"""EDoRA: the small core of LoRA-XS for the direction of a weight's rows, and one trained number each for their length.

    y = g ∘ (x (W + c B R A)ᵀ) + bias,   g_i = m_i / n_i,   n_i = ||W_i + c (B R A)_i||
    n_i² = ||W_i||² + c [B R]_i · (2 [W Aᵀ]_i + c [B R]_i A Aᵀ)

R (r, r) and m (out,) are trained, m from ||W_i||; B and A are frozen as in LoRA-XS; n is a constant for the gradient,
as in DoRA.

H. Nasiri, P. Garraghan, EDoRA: Efficient Weight-Decomposed Low-Rank Adaptation via Singular Value Decomposition, 2025,
arXiv 2501.12067; code: Hamid-Nasiri/EDoRA. The script that the authors released leaves the SVD out and runs with random
A and B: here that is ``init="random"``, and the paper's SVD the default. The code forms B R A (out, in) in every step
for the norms; we keep W Aᵀ (out, r) and A Aᵀ (r, r) instead, so n is that of this weight and this adapter alone, also
where others are on the same layer. Where a row is zero, n is taken as 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..models.calibrate import Statistics
from .contract import Adapter
from .lora_xs import LoRAXS
from .site import Site, SiteKind

__all__ = ["EDoRA"]


@dataclass(frozen=True)
class EDoRA(LoRAXS):
    """Efficient weight-decomposed low-rank adaptation.

    Attributes:
        init: Where A and B come from: "svd" of the weight, or "random" (Kaiming uniform, the authors' script).
        split: Where the singular values go: "right" (A, as in paper and code), "left" (B), "even" (their roots in
            both) or "none". The gradient of R scales with them, direction by direction. Not for "random".
        sigma: Standard deviation of R at the start. With 0 the layer starts exactly as it was, and trains as well.
        solver: How the r leading triplets are found: "auto" (randomized where it pays, within 1 % of the best error),
            "randomized", "lanczos" (to rounding, half the time of "exact"), or "exact".

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = EDoRA(sigma=0).build(site, rank=2, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator().manual_seed(0))
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max())
        (12, 0.0)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear"})

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """R and m trained."""
        return _EDoRAAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r² + out."""
        return rank * rank + site.out_features


class _EDoRAAdapter(Adapter):
    left: Tensor
    core: Tensor
    right: Tensor
    magnitude: Tensor
    squares: Tensor
    cross: Tensor
    gram: Tensor

    def __init__(self, method: EDoRA, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.method = method
        self.scale = scale
        self.parameter("core", rank, rank)
        self.parameter("magnitude", site.out_features)
        self.buffer("left", site.out_features, rank)
        self.buffer("right", rank, site.in_features)
        self.buffer("squares", site.out_features)  # ||W_i||²
        self.buffer("cross", site.out_features, rank)  # W Aᵀ
        self.buffer("gram", rank, rank)  # A Aᵀ

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        factors = self.method.start(weight, self.rank, generator)
        right = factors["right"].to(weight)
        squares = weight.double().square().sum(dim=1).float()
        self.fill(**factors, squares=squares, magnitude=squares.sqrt(), cross=weight @ right.mT, gram=right @ right.mT)
        self.ready = True

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        y = base(x)
        gain = self.gain()
        product = y.to(torch.float32) - _bias(base, x)
        change = (gain - 1) * product + gain * self.update(x.to(torch.float32))
        return y + change.to(y.dtype)

    def update(self, x: Tensor) -> Tensor:
        """c B R A applied to x: the change of direction, before the lengths are set."""
        return self.site.expand(self.site.expand(self.site.reduce(x, self.right), self.scale * self.core), self.left)

    def gain(self) -> Tensor:
        """g (out,)."""
        with torch.no_grad():
            mixed = self.left @ (self.scale * self.core)
            change = (mixed * (2 * self.cross + mixed @ self.gram)).sum(dim=1)
            norms = (self.squares + change).clamp(min=0).sqrt()
        return self.magnitude / torch.where(norms > 0, norms, 1)

    def delta(self, weight: Tensor) -> Tensor:
        gain = self.gain()[:, None]
        return (gain - 1) * weight + gain * (self.left @ (self.scale * self.core) @ self.right)


def _bias(base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | float:
    """What the layer under an adapter adds to its product: its bias if it shows it, else its output for zero."""
    bias = base.bias if hasattr(base, "bias") else base(x.new_zeros(1, x.shape[-1]))[0]
    return 0.0 if bias is None else bias.to(torch.float32)
