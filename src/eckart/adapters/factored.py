"""The adapter most methods are: three factors, some trained, some frozen, with or without their start taken off.

Δ = c (left core right - left_0 core_0 right_0),   left (out, r), core (r, r) or diagonal or absent, right (r, in)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .contract import Adapter
from .site import Site

__all__ = ["Core", "FactoredAdapter", "LowRankAdapter", "kaiming_uniform"]

Core = Literal["none", "diagonal", "full"]


def kaiming_uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A (rows, columns) uniform in ±1 / √columns, as LoRA's A and torch's own linear layers start.

    Args:
        shape: (rows, columns).
        generator: Source of randomness, on the CPU.

    Example:
        >>> kaiming_uniform((3, 4), torch.Generator().manual_seed(0)).abs().max() <= 0.5
        tensor(True)
    """
    start = torch.empty(tuple(shape))
    nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
    return start


class LowRankAdapter(Adapter):
    """An adapter that is its two factors, Δ = left right: it says only what they are."""

    @abstractmethod
    def low_rank(self) -> tuple[Tensor, Tensor]:
        """left (out, k) and right (k, in)."""

    def update(self, x: Tensor) -> Tensor:
        """Δ applied to x, through the k inner features."""
        left, right = self.low_rank()
        return self.site.expand(self.site.reduce(x, right), left)

    def delta(self, weight: Tensor) -> Tensor:
        """left right, (out, in)."""
        left, right = self.low_rank()
        return left @ right


class FactoredAdapter(LowRankAdapter):
    """Δ = c (left core right), minus its value at the start where ``anchored``.

    The two terms share their products: inner features of right and right_0 come from one product, outputs of left and
    left_0 from another. Where only the core is trained the difference of the cores is all there is to do.

    Args:
        site: Where it sits.
        rank: r.
        trained: Which of "left", "core" and "right" are trained; the others are buffers.
        core: "none", "diagonal" (r,) or "full" (r, r).
        anchored: Whether the value at the start is taken off, so that the layer starts as it was.
        scale: c.
    """

    left: Tensor
    right: Tensor
    core: Tensor

    def __init__(
        self,
        site: Site,
        rank: int,
        *,
        trained: Sequence[str],
        core: Core = "none",
        anchored: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__(site, rank)
        self.scale = scale
        self.anchored = anchored
        self.core_kind = core
        shapes: dict[str, tuple[int, ...]] = {"left": (site.out_features, rank), "right": (rank, site.in_features)}
        if core != "none":
            shapes["core"] = (rank,) if core == "diagonal" else (rank, rank)
        for name, shape in shapes.items():
            (self.parameter if name in trained else self.buffer)(name, *shape)
            if anchored and name in trained:
                self.buffer(f"{name}_start", *shape)
        self._outer_moves = "left" in trained or "right" in trained

    def set_factors(self, **factors: Tensor) -> None:
        """Fill the factors, and what is remembered of the start."""
        self.fill(**factors)
        if self.anchored:
            self.fill(**{f"{name}_start": value for name, value in factors.items() if hasattr(self, f"{name}_start")})
        self.ready = True

    def update(self, x: Tensor) -> Tensor:
        """c (left core right - start) applied to x."""
        left, right, core = self._operands()
        z = self.site.reduce(x, right)
        if core is not None:
            z = self.site.scale(z, core) if core.ndim == 1 else self.site.expand(z, core)
        return self.site.expand(z, left)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Factors of Δ: inner dimension r, or 2 r where the start of an outer factor is taken off."""
        left, right, core = self._operands()
        if core is not None:
            left = left * core if core.ndim == 1 else left @ core
        return left, right

    def _operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """left, right and core of the whole Δ, the scale in ``left``."""
        left, right = self.left * self.scale, self.right
        core = self.core if self.core_kind != "none" else None
        if not self.anchored:
            return left, right, core
        if not self._outer_moves:
            assert core is not None
            return left, right, core - self._start("core")
        left_start = self._start("left")
        left = torch.cat([left, left_start * -self.scale], dim=1)
        right = torch.cat([right, self._start("right")])
        if core is not None:
            start = self._start("core")
            core = torch.cat([core, start]) if core.ndim == 1 else torch.block_diag(core, start)
        return left, right, core

    def _start(self, name: str) -> Tensor:
        value: Tensor = getattr(self, f"{name}_start", getattr(self, name))
        return value
