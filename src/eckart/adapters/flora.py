"""FLoRA: a low-rank update in Tucker form, so that the kernel of a convolution keeps its axes.

    Δ = c G ×_out U_o ×_in U_i ×_height U_h ×_width U_w,   G (r, r, k_h, k_w) from 0
    U_o (out, r), U_i (channels, r), U_h (height, k_h), U_w (width, k_w) Kaiming normal;   linear: Δ = c U_o G U_iᵀ

C. Si, X. Wang, X. Yang, Z. Xu, Q. Li, J. Dai, Y. Qiao, X. Yang, W. Shen, FLoRA: Low-Rank Core Space for N-dimension,
2024, arXiv 2405.14739; code: SJTU-DeepVisionLab/FLoRA. For a linear map it is LoRA with a trained square matrix between
the factors; the code of the language experiments starts those from N(0, 0.02²) (``init="normal"``).

Different here: Δ is never formed in a forward pass. A convolution is one of 1 x 1 into r channels, one of height x
width between r channels with the stride, padding and dilation of the layer, and one of 1 x 1 out, which is the same
function (the code convolves with the dense Δ). The published scale is a constant of 4 for convolutions, alpha here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .site import Site, SiteKind

__all__ = ["FLoRA"]

Initial = Literal["kaiming", "normal"]


@dataclass(frozen=True)
class FLoRA(AdapterMethod):
    """Low-rank core space for N dimensions. The rank is that of inputs and outputs.

    Attributes:
        kernel_rank: k_h = k_w, at most the kernel's height and width; 2 in the authors' example.
        init: U at the start: "kaiming" (normal, a = √3, as for images) or "normal" (deviation 0.02, as for text).

    Example:
        >>> site = Site("layer", "conv2d", 8, 6 * 9, (3, 3))
        >>> adapter = FLoRA().build(site, rank=2, scale=1.0)
        >>> weight = torch.randn(8, 54, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator().manual_seed(0))
        >>> adapter.num_trainable() == 2 * (8 + 6) + 2 * (3 + 3) + 2 * 2 * 2 * 2
        True
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d"})

    kernel_rank: int = 2
    init: Initial = "kaiming"

    def __post_init__(self) -> None:
        if self.kernel_rank < 1:
            raise ValueError(f"kernel_rank must be at least 1, not {self.kernel_rank}")
        self.check_choices(init=Initial)

    def shapes(self, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        """The core and the factors of each axis."""
        if site.kernel is None:
            return {"core": (rank, rank), "outputs": (site.out_features, rank), "inputs": (site.in_features, rank)}
        height, width = site.kernel
        k_h, k_w = min(self.kernel_rank, height), min(self.kernel_rank, width)
        channels = site.in_features // (height * width)
        return {
            "core": (rank, rank, k_h, k_w),
            "outputs": (site.out_features, rank),
            "inputs": (channels, rank),
            "rows": (height, k_h),
            "columns": (width, k_w),
        }

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """Core and factors trained."""
        return _FLoRAAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """Π_m r_m + Σ_m d_m r_m over the axes m."""
        return sum(math.prod(shape) for shape in self.shapes(site, rank).values())

    def check(self, site: Site, rank: int) -> str | None:
        """Also whether the rank is at most the channels of a convolution."""
        problem = super().check(site, rank)
        if problem is None and site.kernel is not None:
            channels = site.in_features // math.prod(site.kernel)
            if rank > channels:
                return f"has {channels} input channels, so its rank must be at most {channels}, not {rank}"
        return problem


class _FLoRAAdapter(Adapter):
    core: Tensor
    outputs: Tensor
    inputs: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, method: FLoRA, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.scale, self.init = scale, method.init
        for name, shape in method.shapes(site, rank).items():
            self.parameter(name, *shape)

    @torch.no_grad()
    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        for name, part in self.named_parameters():
            start = torch.zeros(part.shape)
            if name != "core" and self.init == "kaiming":
                nn.init.kaiming_normal_(start, a=math.sqrt(3), generator=generator)
            elif name != "core":
                nn.init.normal_(start, std=0.02, generator=generator)
            part.copy_(start)
        self.ready = True

    def update(self, x: Tensor) -> Tensor:
        if self.site.kernel is None:
            return F.linear(F.linear(F.linear(x, self.inputs.mT), self.core), self.scale * self.outputs)
        inner = F.conv2d(x, self.inputs.mT[:, :, None, None])
        inner = F.conv2d(inner, self._kernel(), **dict(self.site.convolution))
        return F.conv2d(inner, self.scale * self.outputs[:, :, None, None])

    def _kernel(self) -> Tensor:
        """G ×_height U_h ×_width U_w, (r, r, height, width)."""
        return torch.einsum("oiab,ha,wb->oihw", self.core, self.rows, self.columns)

    def delta(self, weight: Tensor) -> Tensor:
        if self.site.kernel is None:
            return self.scale * (self.outputs @ self.core @ self.inputs.mT)
        whole = torch.einsum("abhw,oa,ib->oihw", self._kernel(), self.outputs, self.inputs)
        return self.scale * whole.flatten(1)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """U_o, and the rest: rank r in the axis of the outputs."""
        if self.site.kernel is None:
            return self.scale * self.outputs, self.core @ self.inputs.mT
        rest = torch.einsum("abhw,ib->aihw", self._kernel(), self.inputs)
        return self.scale * self.outputs, rest.flatten(1)
