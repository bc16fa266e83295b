"""PETALface: two low-rank branches, blended for each sample by how good its image is.

    y = x Wᵀ + (1 - a) c x D_1ᵀ U_1ᵀ + a c x D_2ᵀ U_2ᵀ,   a = clamp(0.5 + q - τ, 0, 1)
      = (1 - a) x (W + Δ_1)ᵀ + a x (W + Δ_2)ᵀ,   Δ_i = c U_i D_i
    D_i (r, in) from N(0, 1 / r²), U_i (out, r) from 0,   q, a: one number for each sample

The first branch serves the poor images, the second the good ones. The paper adapts the query, key and value of a Swin
transformer so, and its last projection with one ordinary LoRA.

K. Narayan, N. G. Nair, J. Xu, R. Chellappa, V. M. Patel, PETALface: Parameter Efficient Transfer Learning for
Low-resolution Face Recognition, WACV 2025, arXiv 2412.07771; code: Kartik-3004/PETALface.

Different here: a is clamped, without which a score on another scale than [0, 1] (BRISQUE's) makes one branch negative.
U starts at zero and stays so until trained, where the released model draws it anew. The score can be given, from
whatever network rates images; else it is computed from the pixels, in closed form. Both branches are one product, a is
applied to the inner features, and the dropout is left out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .coordinator import Coordinator
from .site import Site, SiteKind

__all__ = ["PETALface", "sharpness"]


def sharpness(images: Tensor, reference: float) -> Tensor:
    """Score in [0, 1] of how sharp images are: v / (v + reference).

        v = var(L * g) / var(g),   g the mean of the channels, L = [[0, 1, 0], [1, -4, 1], [0, 1, 0]]

    The same for every brightness and contrast, so images may be normalised or not. A flat image has score 0.

    Args:
        images: (batch, channels, height, width), height and width at least 3.
        reference: v at which the score is 1/2.

    Returns:
        (batch,) float32.

    Example:
        >>> noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        >>> smooth = torch.nn.functional.avg_pool2d(noise, 9, stride=1)
        >>> bool(sharpness(noise, 0.1) > sharpness(smooth, 0.1))
        True
    """
    if images.ndim != 4 or min(images.shape[2:]) < 3:
        raise ValueError(
            "only images (batch, channels, height, width) of 3 pixels and more can be rated, not pixel_values "
            f"{tuple(images.shape)}; call the model with quality=, a tensor (batch,)"
        )
    gray = images.to(torch.float32).mean(dim=1)
    gray = gray - gray.mean(dim=(1, 2), keepdim=True)
    # Brought to a size of 1 before it is squared. Rounding of a flat image is no detail.
    size = gray.abs().amax(dim=(1, 2), keepdim=True)
    flat = size <= 1e-6 * images.to(torch.float32).abs().amax(dim=(1, 2, 3), keepdim=True)[:, 0]
    gray = torch.where(flat, 0.0, gray / torch.where(flat, 1.0, size))
    inside, rows, columns = gray[:, 1:-1, 1:-1], gray[:, :, 1:-1], gray[:, 1:-1, :]
    laplacian = rows[:, :-2] + rows[:, 2:] + columns[:, :, :-2] + columns[:, :, 2:] - 4 * inside
    detail, contrast = laplacian.var(dim=(1, 2), correction=0), gray.var(dim=(1, 2), correction=0)
    return detail / (detail + reference * contrast).clamp_min(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class PETALface(AdapterMethod):
    """Two branches of the rank each, blended by the quality of the image.

    The model may be called with ``quality=``, a tensor (batch,) of scores in [0, 1], higher for better, which it does
    not see itself. Without, the score is `sharpness` of the keyword argument ``pixel_values``; without that, each
    branch counts half.

    Attributes:
        threshold: τ, the score at which each branch counts half; it depends on the data and on what rates it.
        reference: The v of `sharpness` that has a score of 1/2; for a balanced blend its median over the images.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = PETALface().build(site, rank=2, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator().manual_seed(0))
        >>> adapter.num_trainable(), bool((adapter.blended_weights(weight)[0] == weight).all())
        (56, True)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d"})
    mergeable: ClassVar[bool] = False

    threshold: float = 0.5
    reference: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be a score, 0 to 1, not {self.threshold}; bring other scores to [0, 1]")
        if not 0 < self.reference < math.inf:
            raise ValueError(f"reference must be a number above 0, not {self.reference}")

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """Both branches trained."""
        return _PETALfaceAdapter(site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """2 r (in + out)."""
        return 2 * rank * (site.in_features + site.out_features)

    def coordinate(self, adapters: Mapping[str, Adapter], seed: int) -> Coordinator | None:
        """What rates the samples."""
        return _Quality(self, adapters, seed)


class _PETALfaceAdapter(Adapter):
    left: Tensor
    right: Tensor

    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.scale = scale
        self.quality: _Quality | None = None
        self.parameter("left", site.out_features, 2 * rank)  # U_1 and U_2 side by side
        self.parameter("right", 2 * rank, site.in_features)  # D_1 above D_2

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        draw = torch.randn(self.right.shape, generator=generator) / self.rank
        self.fill(left=torch.zeros_like(self.left), right=draw)
        self.ready = True

    def update(self, x: Tensor) -> Tensor:
        z = self.site.reduce(x, self.right)
        alpha = None if self.quality is None else self.quality.alpha
        if alpha is None:
            return self.site.expand(z, 0.5 * self.scale * self.left)
        if len(x) % len(alpha):
            raise ValueError(
                f"{self.site.name}: its input has {len(x)} rows, which {len(alpha)} samples cannot share evenly; "
                "give one quality a sample, and adapt only layers that see one sample after the other"
            )
        # Windows and patches of one sample follow one another.
        alpha = alpha.to(z.device).repeat_interleave(len(x) // len(alpha))
        blend = torch.stack([1 - alpha, alpha], dim=1).repeat_interleave(self.rank, dim=1)
        shape = (-1, 2 * self.rank, 1, 1) if self.site.kind == "conv2d" else (-1, *[1] * (z.ndim - 2), 2 * self.rank)
        return self.site.expand(z * blend.view(shape).to(z.dtype), self.scale * self.left)

    def blended_weights(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """W + Δ_1 and W + Δ_2 (out, in): what the worst and what the best image sees.

        Args:
            weight: W (out, in) float32, as `eckart.adapters.layer.base_weight` reads it.
        """
        lefts, rights = (self.scale * self.left).split(self.rank, dim=1), self.right.split(self.rank)
        poor, good = (weight + left @ right for left, right in zip(lefts, rights, strict=True))
        return poor, good

    def delta(self, weight: Tensor) -> Tensor:
        raise ValueError(
            f"{self.site.name}: its weight depends on the quality of each sample, so there is no one to merge; "
            "blended_weights gives the two it lies between"
        )


class _Quality(Coordinator):
    """Rates the samples before each forward pass; the adapters read ``alpha`` (batch,), None for a half."""

    counts_steps: ClassVar[bool] = False

    def __init__(self, method: PETALface, adapters: Mapping[str, Any], seed: int) -> None:
        super().__init__(adapters, seed)
        self.method = method
        self.alpha: Tensor | None = None
        self.warned = False
        for adapter in self.adapters.values():
            assert isinstance(adapter, _PETALfaceAdapter)
            adapter.quality = self

    def before_forward(self, kwargs: dict[str, Any], training: bool) -> None:
        quality, images = kwargs.pop("quality", None), kwargs.get("pixel_values")
        self.alpha = None
        if quality is not None:
            quality = torch.as_tensor(quality, dtype=torch.float32).detach()
            if quality.ndim != 1 or not len(quality):
                raise ValueError(f"quality must be a tensor (batch,), one score a sample, not {tuple(quality.shape)}")
        elif images is not None:
            quality = sharpness(images.detach(), self.method.reference)
        if quality is None and not self.warned:
            self.warned = True
            warnings.warn(
                "petalface has neither quality= nor pixel_values= and blends both branches by half; give one of them",
                stacklevel=2,
            )
        if quality is not None:
            self.alpha = (0.5 + quality - self.method.threshold).clamp(0, 1)
