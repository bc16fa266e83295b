"""Where the heads of one attention layer are, and their thin matrices as the weights are now.

`eckart.models.head_maps` finds them and says what is folded in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .head_rotation import Rotation
from .select import LinearRef

__all__ = ["PARTS", "HeadLayer", "HeadMaps", "Part"]

Part = Literal["query", "key", "value"]
PARTS: tuple[Part, ...] = ("query", "key", "value")


@dataclass(frozen=True)
class HeadMaps:
    """The heads of one layer. Query head i uses key and value ``i // (heads // groups)``.

    Attributes:
        query: (heads, h, d).
        key: (groups, h, d).
        value: (groups, w, d).
        output: (heads, d, w).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


@dataclass(frozen=True)
class HeadLayer:
    """Where the heads of one attention layer are.

    Attributes:
        name: Full name of the output projection.
        stack: The list of blocks that it is in; only layers of one list share a residual stream.
        output: The output projection.
        heads: Number of query heads.
        groups: Number of heads of keys and values.
        width: d of the residual stream.
        rotation: How queries and keys are turned by position, if they are.
        centred: Whether what it reads has no mean, so that the direction of all ones is inert.
        written_gain: (d,) of a norm between the output projection and the stream.
    """

    name: str
    stack: str
    output: LinearRef
    heads: int
    groups: int
    width: int
    rotation: Rotation | None
    centred: bool
    written_gain: Tensor | None = field(repr=False)
    _projections: Mapping[Part, tuple[LinearRef, Tensor]] = field(repr=False)  # and which of its rows
    _read_gains: Mapping[Part, tuple[Tensor, bool] | None] = field(repr=False)
    _head_gains: Mapping[Part, Tensor] = field(repr=False)

    def maps(self, dtype: torch.dtype | None = None) -> HeadMaps:
        """The thin matrices as the weights are now.

        Args:
            dtype: of the result; default float64 if the model is, else float32.
        """
        dtype = dtype or torch.promote_types(torch.float32, self.output.dtype)
        return HeadMaps(**{part: self._reading(part, dtype) for part in PARTS}, output=self._writing(dtype))

    def _reading(self, part: Part, dtype: torch.dtype) -> Tensor:
        ref, rows = self._projections[part]
        weight = ref.weight.detach().to(dtype)[rows.to(ref.weight.device)]
        if (gain := self._read_gains[part]) is not None:
            weight = weight * gain[0].to(weight)
            if gain[1]:
                weight = weight - weight.mean(dim=1, keepdim=True)
        heads = self.heads if part == "query" else self.groups
        weight = weight.view(heads, -1, self.width)
        if part in self._head_gains:
            weight = weight * self._head_gains[part].to(weight).view(-1, weight.shape[1], 1)
        return weight

    def _writing(self, dtype: torch.dtype) -> Tensor:
        weight = self.output.weight.detach().to(dtype)
        if self.written_gain is not None:
            weight = weight * self.written_gain.to(weight)[:, None]
        if self.centred:
            weight = weight - weight.mean(dim=0, keepdim=True)
        return weight.view(self.width, self.heads, -1).transpose(0, 1)
