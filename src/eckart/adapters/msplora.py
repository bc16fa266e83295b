"""MSPLoRA: three low-rank adapters a layer, one of the whole model, one of a third of its layers, one of its own.

    Δ_l = (alpha / r) B A + (alpha / r_1) B_p A_p + (alpha / r_2) B_l A_l,   r_1 = r // 2, r_2 = r // 4
    B, A shared by all layers of a kind, B_p, A_p by those of part p of three;   B from 0, A Kaiming uniform

J. Zhao, X. Yu, Z. Yang, MSPLoRA: A Multi-Scale Pyramid Low-Rank Adaptation for Efficient Model Fine-Tuning, 2025, arXiv
2503.21838; code: Oblivioniss/MSPLoRA. Layers are of a kind if their names differ in indices only, as layers.3.q_proj
and layers.4.q_proj, and their shapes are equal: shared are the adapters of all q_proj, and of all v_proj.

The released code counts these parameters but applies a shared pair only in the layer that owns it, and where the number
of layers is not divisible by three its parts overlap; here every layer sums all its levels, and part p of L layers is
from p L // 3. Its option to train one level after another, which no published setting uses, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .factored import LowRankAdapter, kaiming_uniform
from .site import Site, SiteKind

__all__ = ["MSPLoRA"]

_LEVELS = ("model", "part", "layer")


@dataclass(frozen=True)
class MSPLoRA(AdapterMethod):
    """Multi-scale pyramid low-rank adaptation. The rank is that of the top of the pyramid.

    Attributes:
        levels: 3 (the method), 2 (no parts) or 1 (only what the whole model shares).
        parts: Of the model, each with a pair of its own.

    Example:
        >>> method = MSPLoRA()
        >>> method.ranks_of_levels(8)
        {'model': 8, 'part': 4, 'layer': 2}
        >>> sites = {f"layers.{i}.q_proj": Site(f"layers.{i}.q_proj", "linear", 16, 16) for i in range(6)}
        >>> method.total_trainable(sites, dict.fromkeys(sites, 8)) == 32 * (8 + 3 * 4 + 6 * 2)
        True
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d", "embedding"})

    levels: int = 3
    parts: int = 3

    def __post_init__(self) -> None:
        if self.levels not in (1, 2, 3):
            raise ValueError(f"levels must be 1, 2 or 3, not {self.levels}")
        if self.parts < 1:
            raise ValueError(f"parts must be at least 1, not {self.parts}; the paper has 3")

    def ranks_of_levels(self, rank: int) -> dict[str, int]:
        """Rank of each level that has one; with two levels the parts are left out."""
        names = {1: ("model",), 2: ("model", "layer"), 3: _LEVELS}[self.levels]
        return {name: rank >> index for index, name in enumerate(names) if rank >> index}

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """A pair for each level, all its own until `link`."""
        return _PyramidAdapter(self.ranks_of_levels(rank), site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """(r + r_1 + r_2) (in + out): what a layer uses."""
        return sum(self.ranks_of_levels(rank).values()) * (site.in_features + site.out_features)

    def total_trainable(self, sites: Mapping[str, Site], ranks: Mapping[str, int]) -> int:
        """(in + out) (r + 3 r_1 + L r_2) for every kind of L layers."""
        total = 0
        for group in _kinds(sites, ranks):
            site, rank, count = sites[group[0]], ranks[group[0]], len(group)
            times = {"model": 1, "part": len(set(_parts(count, self.parts))), "layer": count}
            per_level = self.ranks_of_levels(rank)
            total += (site.in_features + site.out_features) * sum(times[name] * r for name, r in per_level.items())
        return total

    def link(self, adapters: Mapping[str, Adapter]) -> None:
        """Share the upper levels; the first layer that uses a pair owns it."""
        sites = {name: adapter.site for name, adapter in adapters.items()}
        for group in _kinds(sites, {name: adapter.rank for name, adapter in adapters.items()}):
            members = [adapters[name] for name in group]
            part_of = _parts(len(members), self.parts)
            for index, adapter in enumerate(members):
                owners = {"model": members[0], "part": members[part_of.index(part_of[index])]}
                for level, owner in owners.items():
                    if owner is not adapter and level in self.ranks_of_levels(adapter.rank):
                        adapter.share(owner, f"{level}_left", f"{level}_right")


def _kinds(sites: Mapping[str, Site], ranks: Mapping[str, int]) -> list[list[str]]:
    """Names that are one but for the indices in them, of one shape and one rank, in order."""
    groups: dict[object, list[str]] = {}
    for name, site in sites.items():
        place = ".".join("*" if part.isdigit() else part for part in name.split("."))  # w1 and w3 are two kinds
        kind = (place, site.kind, site.out_features, site.in_features, ranks[name])
        groups.setdefault(kind, []).append(name)
    return list(groups.values())


def _parts(count: int, parts: int) -> list[int]:
    """The part of each of ``count`` layers: part p begins at p count // parts."""
    return [(parts * (index + 1) - 1) // count for index in range(count)]


class _PyramidAdapter(LowRankAdapter):
    def __init__(self, ranks: Mapping[str, int], site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.alpha = scale * rank
        self.levels = dict(ranks)
        for level, r in ranks.items():
            self.parameter(f"{level}_left", site.out_features, r)
            self.parameter(f"{level}_right", r, site.in_features)

    @torch.no_grad()
    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        for name, part in self.named_parameters():  # its own: what is shared is its owner's to fill
            part.copy_(kaiming_uniform(part.shape, generator) if name.endswith("right") else torch.zeros(part.shape))
        self.ready = True

    def low_rank(self) -> tuple[Tensor, Tensor]:
        left = [self.alpha / r * getattr(self, f"{level}_left") for level, r in self.levels.items()]
        return torch.cat(left, dim=1), torch.cat([getattr(self, f"{level}_right") for level in self.levels])
