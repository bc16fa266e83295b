"""What changed between two models with the same weights by name and shape, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..linalg import LinalgError, effective_rank, singular_values, stable_rank
from ..models.pairs import Pair, map_pairs

__all__ = ["Difference", "differences"]


@dataclass(frozen=True)
class Difference:
    """D = after - before of one weight (m, n).

    Attributes:
        name: dotted module name.
        relative: ||D||_F / ||before||_F.
        stable_rank: ||D||_F^2 / s_1(D)^2; 0 if nothing changed.
        effective_rank: exp of the entropy of the singular values of D; 0 if nothing changed.
        singular_values: (min(m, n),) those of D, descending.
    """

    name: str
    relative: float
    stable_rank: float
    effective_rank: float
    singular_values: torch.Tensor = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; the singular values are left out."""
        return {key: getattr(self, key) for key in ("relative", "stable_rank", "effective_rank")}


def differences(pairs: Sequence[Pair], *, progress: bool = True) -> list[Difference]:
    """The difference of every weight that two models have in the same place.

    Args:
        pairs: what `eckart.models.pairs.pair` returns.
        progress: show a bar with the time left.

    Raises:
        ValueError: NaN or Inf in a weight, named by layer.

    Example:
        >>> from torch import nn
        >>> from eckart.models import linears
        >>> from eckart.models.pairs import pair
        >>> def model(scale):
        ...     layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2, bias=False))])
        ...     layers[0][0].weight.data = scale * torch.eye(2)
        ...     return nn.ModuleDict({"layers": layers})
        >>> [found] = differences(pair(linears(model(1.0)), linears(model(1.5))), progress=False)
        >>> found.relative, found.stable_rank
        (0.5, 2.0)
    """
    return map_pairs(_difference, pairs, "differences", progress=progress)


def _difference(both: Pair) -> Difference:
    before, after = both.read()
    try:
        s = singular_values(after.float() - before.float()).double().cpu()
    except LinalgError as error:
        raise LinalgError(f"{both.name}: {error}") from error
    size, changed = float(torch.linalg.vector_norm(before.double())), bool(s[0] > 0)
    relative = float(s.norm()) / size if size else float(changed)
    return Difference(
        both.name,
        relative,
        stable_rank(s) if changed else 0.0,
        effective_rank(s) if changed else 0.0,
        s.float(),
    )
