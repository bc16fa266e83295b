"""Bone: cut a weight into blocks and let whole rows or columns of them share one small trained matrix.

    form="bat"    W'_ij = W_ij + c (W_ij β_i + β_i),   W_ij (r, r) blocks of W (out, in),   β (out / r, r, r) from 0
                  or with β_j in place of β_i,   β (in / r, r, r)
    form="bone"   y = x Wᵀ + c (Σ_j x_j) D,   x_j the chunks of x of length r,   D (r, out) from 0

J. Kang, Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models, 2024,
arXiv 2409.15371; code: JL-er/Bone. The name has changed its meaning: "bat" is the method of versions 1 to 3 of the
paper, whose change may have full rank; "bone" is that of the later ones, LoRA with the frozen A = [I I ... I], which
PEFT ships as ``MissConfig``. The paper has no scale, so c is 1 unless alpha is given.

Different here: W is not kept for "bat". Where β belongs to the columns, the layer is applied to x_j + c β_j x_j: no
matrix of the size of W is formed, and a quantized base is not dequantized by us. Where it belongs to the rows, as in
the paper and in PEFT, each row of blocks would need an input of its own; there W is read by applying the layer to the
identity, in each forward and again in the backward pass, so that nothing of that size is kept between them. A layer of
width 1024 then takes 3.5 times as long for 1024 tokens as it does frozen, 1.1 times where β belongs to the columns and
1.0 times in the linear form. "Bone-AB" and "Bone-free" of the code's read-me are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .factored import LowRankAdapter
from .site import Site

__all__ = ["Bone", "block_affine"]

Form = Literal["bat", "bone"]
Along = Literal["rows", "columns"]

# Times the identity when a weight is read: the bias is small beside it, also after rounding to half precision.
_READ = 256.0


def block_affine(weight: Tensor, blocks: Tensor, along: Along) -> Tensor:
    """W_ij β + β for every block of a weight, (out, in).

    Args:
        weight: W (out, in), both divisible by r.
        blocks: β (out / r, r, r) for "rows", one for each i, or (in / r, r, r) for "columns", one for each j.
        along: Which blocks share a β.
    """
    r = blocks.shape[-1]
    tiles = weight.unflatten(1, (-1, r)).unflatten(0, (-1, r)).transpose(1, 2)  # (out / r, in / r, r, r)
    shared = blocks[:, None] if along == "rows" else blocks[None]
    return (tiles @ shared + shared).transpose(1, 2).reshape(weight.shape)


@dataclass(frozen=True)
class Bone(AdapterMethod):
    """Block affine transformation.

    Attributes:
        form: "bat" (block affine, the first paper) or "bone" (the linear form of the later versions).
        along: For "bat", which blocks share a matrix: those of one of the "rows" of blocks (Bone-col, as in the paper),
            or of one of the "columns" (Bone-row, much the cheaper).

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = Bone().build(site, rank=2, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator())
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max())
        (16, 0.0)
    """

    form: Form = "bat"
    along: Along = "rows"

    def __post_init__(self) -> None:
        self.check_choices(form=Form, along=Along)

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """β or D trained, from 0."""
        return (_LinearAdapter if self.form == "bone" else _BlockAffineAdapter)(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r out, or r in for "bat" along columns."""
        return rank * (site.in_features if self.form == "bat" and self.along == "columns" else site.out_features)

    def check(self, site: Site, rank: int) -> str | None:
        """Also whether the blocks of "bat" fill the weight."""
        problem = super().check(site, rank)
        if problem is None and self.form == "bat" and (site.out_features % rank or site.in_features % rank):
            return (
                f"has shape ({site.out_features}, {site.in_features}), of which rank {rank} does not divide both; "
                'choose a rank that does, or form="bone"'
            )
        return problem


class _LinearAdapter(LowRankAdapter):
    shared: Tensor

    def __init__(self, method: Bone, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.scale = scale
        self.parameter("shared", rank, site.out_features)  # D

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        self.fill(shared=torch.zeros_like(self.shared))
        self.ready = True

    def update(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, -x.shape[-1] % self.rank))
        return padded.unflatten(-1, (-1, self.rank)).sum(dim=-2) @ (self.scale * self.shared)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        eye = torch.eye(self.rank, device=self.shared.device)
        chunks = -(-self.site.in_features // self.rank)
        return self.scale * self.shared.mT, eye.repeat(1, chunks)[:, : self.site.in_features]


class _BlockAffineAdapter(Adapter):
    blocks: Tensor

    def __init__(self, method: Bone, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.scale, self.along = scale, method.along
        length = site.out_features if method.along == "rows" else site.in_features
        self.parameter("blocks", length // rank, rank, rank)  # β

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        self.fill(blocks=torch.zeros_like(self.blocks))
        self.ready = True

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        if self.along == "rows":
            y = base(x)
            change: Tensor = checkpoint(self._from_weight, x, base, use_reentrant=False)
            return y + change.to(y.dtype)
        turned = self._turned(x.to(torch.float32))
        y = base((x + turned.flatten(-2)).to(x.dtype))
        return y + self._tiled(turned).to(y.dtype)

    def update(self, x: Tensor) -> Tensor:
        """Of "columns", what does not go through the weight."""
        return self._tiled(self._turned(x))

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale * block_affine(weight, self.blocks, self.along)

    def _turned(self, x: Tensor) -> Tensor:
        """c β_j x_j, (..., in / r, r)."""
        return torch.einsum("...jb,jab->...ja", x.unflatten(-1, (-1, self.rank)), self.scale * self.blocks)

    def _tiled(self, turned: Tensor) -> Tensor:
        """Σ_j c β_j x_j for every row of blocks, (..., out)."""
        return turned.sum(dim=-2).repeat(*[1] * (turned.ndim - 2), self.site.out_features // self.rank)

    def _from_weight(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        columns = base(_READ * torch.eye(self.site.in_features, dtype=x.dtype, device=x.device)).to(torch.float32)
        bias = getattr(base, "bias", None)
        weight = (columns if bias is None else columns - bias) / _READ
        return F.linear(x.to(torch.float32), self.delta(weight.mT))
