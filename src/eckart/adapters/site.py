"""The place of an adapter: one weight of a model, whatever module holds it.

    W (out, in);   linear y = x Wᵀ;   convolution y = conv(x, W), in = channels * area;   embedding y = W[:, index]

An adapter of low rank goes through W in two halves, to the r inner features and back. What the halves are for a
linear map, a convolution or a lookup is known here, so that a method is written once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..models.kinds import linear_kind

__all__ = ["Site", "SiteKind", "site_of"]

SiteKind = Literal["linear", "conv2d", "embedding"]


@dataclass(frozen=True)
class Site:
    """Shape and kind of one adapted weight.

    Attributes:
        name: Full name of its module.
        kind: "linear" (`nn.Linear`, `Conv1D`, structures, quantized linears), "conv2d" or "embedding".
        out_features: Rows of W.
        in_features: Columns of W; for a convolution input channels times kernel area, for an embedding the
            vocabulary.
        kernel: (height, width) of a convolution, else None.
        convolution: Stride, padding and dilation of a convolution, as keyword arguments.
    """

    name: str
    kind: SiteKind
    out_features: int
    in_features: int
    kernel: tuple[int, int] | None = None
    convolution: tuple[tuple[str, Any], ...] = ()

    @property
    def largest_rank(self) -> int:
        """min(out, in)."""
        return min(self.out_features, self.in_features)

    def reduce(self, x: Tensor, right: Tensor) -> Tensor:
        """The inner features of x: right (r, in) applied as W would be."""
        if self.kind == "embedding":
            return F.embedding(x, right.mT)
        if self.kind == "conv2d":
            assert self.kernel is not None
            return F.conv2d(x, right.unflatten(1, (-1, *self.kernel)), **dict(self.convolution))
        return F.linear(x, right)

    def scale(self, z: Tensor, factors: Tensor) -> Tensor:
        """Inner features times factors (r,)."""
        return z * (factors[:, None, None] if self.kind == "conv2d" else factors)

    def expand(self, z: Tensor, left: Tensor) -> Tensor:
        """left (out, r) applied to inner features; also a core (r, r)."""
        return F.conv2d(z, left[:, :, None, None]) if self.kind == "conv2d" else F.linear(z, left)


def site_of(name: str, module: nn.Module) -> Site | None:
    """The site that a module offers, or None if no adapter can be put there.

    Example:
        >>> site_of("head", nn.Linear(4, 3))
        Site(name='head', kind='linear', out_features=3, in_features=4, kernel=None, convolution=())
        >>> site_of("norm", nn.LayerNorm(4)) is None
        True
    """
    if isinstance(module, nn.Embedding):
        return Site(name, "embedding", module.embedding_dim, module.num_embeddings)
    if isinstance(module, nn.Conv2d):
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            return None
        options = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        area = module.kernel_size[0] * module.kernel_size[1]
        kernel = (module.kernel_size[0], module.kernel_size[1])
        return Site(
            name, "conv2d", module.out_channels, module.in_channels * area, kernel, tuple(sorted(options.items()))
        )
    if linear_kind(module) == "conv1d":
        rows, columns = module.get_parameter("weight").shape
        return Site(name, "linear", columns, rows)
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return Site(name, "linear", sizes[1], sizes[0])
    return None
