"""The leading directions of fine-tuned weights, and what can be scaled down in them; a part of intruders.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eckart.analysis.intruder_dimensions import IntruderDimensions, Leading, leading
from eckart.linalg import SingularBasis
from eckart.models import linears


@dataclass
class Layer:
    """One weight: as it was, as it is, and the directions that are scaled.

    Attributes:
        weight: the parameter (out, in) of the tuned model.
        before: W0.
        after: a copy of W.
        found: the leading directions.
        intruders: which of them count as such for the edits.
        others: as many of the others, at random.
    """

    weight: Tensor
    before: Tensor
    after: Tensor
    found: Leading
    intruders: Tensor
    others: Tensor

    def part(self, chosen: Tensor) -> Tensor:
        """Sum of the chosen s_j u_j v_jᵀ."""
        product: Tensor = (self.found.u[:, chosen] * self.found.s[chosen]) @ self.found.vh[chosen]
        return product.to(self.weight.dtype)


def look(base: nn.Module, model: nn.Module, options: IntruderDimensions) -> tuple[list[Layer], float]:
    """The leading directions of every weight against the base's, and the threshold that edits go by.

    That is the paper's or, if nothing is below it, the lowest of the sweep above it that something is below.
    """
    pairs = []
    for old, new in zip(linears(base).linears, linears(model).linears, strict=True):
        before, weight = old.weight.detach(), new.weight.detach()
        pairs.append((before, weight, leading(weight, SingularBasis(before), options.top, options.near)))
    least = min(float(found.cosines.min()) for _, _, found in pairs)
    higher = [one for one in options.sweep if one > max(least, options.threshold)]
    threshold = options.threshold if least < options.threshold else min(higher, default=options.threshold)
    generator = torch.Generator().manual_seed(1)
    layers = []
    for before, weight, found in pairs:
        intruders = found.intruders(threshold)
        rest = torch.tensor([j for j in range(len(found.s)) if j not in intruders.tolist()], dtype=torch.long)
        others = rest[torch.randperm(len(rest), generator=generator)[: len(intruders)]]
        layers.append(Layer(weight, before, weight.clone(), found, intruders, others))
    return layers, threshold


def edits(layers: list[Layer]) -> dict[str, Callable[[Layer, float], Tensor]]:
    """New weights for λ, by what is scaled."""
    size = math.sqrt(sum(float(one.found.s[one.intruders].square().sum()) for one in layers))
    moved = math.sqrt(sum(float((one.after - one.before).norm()) ** 2 for one in layers))

    def same_norm(one: Layer, scale: float) -> Tensor:
        kept = max(0.0, 1 - (1 - scale) * size / moved)
        return one.before + kept * (one.after - one.before)

    return {
        "intruders": lambda one, scale: one.after + (scale - 1) * one.part(one.intruders),
        "whole change": same_norm,
        "whole change, λ": lambda one, scale: one.before + scale * (one.after - one.before),
        "others": lambda one, scale: one.after + (scale - 1) * one.part(one.others),
    }
