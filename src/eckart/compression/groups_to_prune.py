"""Heads and channels as groups that go together: their scores, their masks, and how they are cut out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..models.calibrate import Statistics
from ..models.geometry import Geometry, set_geometry
from ..models.parts import AttentionPart, MLPPart
from ..models.replace import replace
from ..models.result import LayerResult
from ..models.select import LinearRef
from ..models.slices import columns_of, rows_of_linear
from .layer import left_dense, relative_error

__all__ = ["Group", "cut_out", "groups_of"]

_COUNTS = ("num_heads", "n_head", "num_attention_heads", "num_key_value_heads")


@dataclass
class Group:
    """The groups of one part: key-value heads with their query heads, or channels.

    Attributes:
        part: attention or an MLP.
        count: number of groups.
        remove: how many are to go.
        scores: (count,) moving average of importance.
        mask: (count,) 1 for what stays.
    """

    part: AttentionPart | MLPPart
    count: int
    remove: int
    scores: Tensor = field(init=False)
    mask: Tensor = field(init=False)

    def __post_init__(self) -> None:
        device = self.part.output.weight.device
        self.scores = torch.zeros(self.count, dtype=torch.float64, device=device)
        self.mask = torch.ones(self.count, dtype=torch.float64, device=device)

    def observe(self, importances: Iterable[tuple[Tensor, bool]], momentum: float) -> None:
        """Take in the importance (m, n) of each linear, summed over what belongs to a group."""
        total = torch.zeros_like(self.scores)
        for importance, columns in importances:
            along = importance.double().sum(0 if columns else 1)
            mine = along.reshape(self.count, -1).sum(1)
            total += mine / (mine.norm() + 1e-8)
        if bool(total.isfinite().all()):
            self.scores = momentum * self.scores + (1 - momentum) * total

    def mask_lowest(self, fraction: float) -> None:
        """Mask the lowest so many; what is masked already is lowest."""
        gone = int(fraction * self.remove)
        order = (self.scores * self.mask).masked_fill(self.mask == 0, -1).argsort(stable=True)
        self.mask = torch.ones_like(self.mask)
        self.mask[order[:gone]] = 0

    def output_masks(self) -> Iterable[tuple[str, Callable[[], Tensor]]]:
        """Linears whose outputs are masked, and the mask of each (out,) at the time of the call."""

        def spread(width: int) -> Tensor:
            return self.mask.repeat_interleave(width // self.count)

        for ref in self.part.linears[:-1]:
            yield ref.name, partial(spread, ref.out_features)

    def kept(self, ref: LinearRef) -> Tensor:
        """Indices of the rows of a linear, or of the columns of the output, that stay."""
        width = ref.in_features if ref is self.part.output else ref.out_features
        return self.mask.bool().repeat_interleave(width // self.count).nonzero().flatten()


def groups_of(prunable: Sequence[tuple[int, AttentionPart | MLPPart]], numbers: int) -> list[Group]:
    """Groups of the parts, with how many of each go so that at least so many numbers do.

    Every block loses the same fraction: heads rounded down, channels rounded up to make up for it.

    Args:
        prunable: (block, part).
        numbers: how many numbers of the weights are to go in all.

    Raises:
        ValueError: there is nothing to prune, or not enough of it.
    """
    sizes = {id(part): sum(r.in_features * r.out_features for r in part.linears) for _, part in prunable}
    total = sum(sizes.values())
    if not prunable:
        raise ValueError("no block may lose heads or channels: lower spared, or select whole attentions and MLPs")
    share = numbers / total
    if share >= 1:
        raise ValueError(f"{numbers:,} numbers cannot go from the {total:,} that may; lower ratio or spared")
    found = []
    for place in dict.fromkeys(place for place, _ in prunable):
        mine = [part for where, part in prunable if where == place]
        owed = share * sum(sizes[id(part)] for part in mine)
        for part in sorted(mine, key=lambda part: isinstance(part, MLPPart)):
            count = part.kv_heads if isinstance(part, AttentionPart) else part.width
            each = sizes[id(part)] // count
            wanted = int(share * count) if isinstance(part, AttentionPart) else math.ceil(owed / each)
            remove = max(0, min(wanted, count - 1))
            owed -= remove * each
            found.append(Group(part, count, remove))
        if owed > 0:
            raise ValueError(
                f"{mine[0].name}: its heads and channels cannot lose the fraction {share:.2f}; lower ratio or spared, "
                "or select the MLPs too"
            )
    return found


def cut_out(model: nn.Module, groups: Sequence[Group]) -> dict[str, LayerResult]:
    """Cut out what is masked, in place; the record of each linear."""
    records: dict[str, LayerResult] = {}
    for group in groups:
        part = group.part
        if not group.remove:
            records.update({ref.name: left_dense(ref) for ref in part.linears})
            continue
        for ref in part.linears:
            kept = group.kept(ref)
            new = columns_of(ref, kept) if ref is part.output else rows_of_linear(ref, kept)
            shape = (new.out_features, new.in_features)
            weight, dim = ref.weight.detach(), 1 if ref is part.output else 0
            left = torch.zeros_like(weight).index_copy(dim, kept, new.dense())
            error = relative_error(weight, left, Statistics())
            records[ref.name] = LayerResult(ref.name, ref.shape, min(shape), "pruned", math.prod(shape), error)
            replace(model, ref.name, new, resize=True)
        if isinstance(part, AttentionPart):
            before = {"num_key_value_heads": part.kv_heads}
            after = part.kv_heads - group.remove
            counts = {
                name: after if before.get(name) == value else after * (part.heads // part.kv_heads)
                for name in _COUNTS
                if isinstance(value := getattr(part.module, name, None), int)
            }
            if counts:
                set_geometry(part.module, Geometry(counts))
    return records
