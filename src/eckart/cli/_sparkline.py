"""A spectrum as a word: one block character for each part of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["sparkline"]

_BLOCKS = " ▁▂▃▄▅▆▇█"


def sparkline(spectra: Sequence[Tensor], width: int = 8, *, ascii_only: bool = False) -> str:
    """Singular values over the largest, in parts of equal rank, each as high as its mean; the median of several.

    Args:
        spectra: singular values of weights of one shape, each descending.
        width: characters, at most as many as there are values.
        ascii_only: digits from 0 to 8 in place of blocks.

    Returns:
        A space stands for values that vanish, less than 1e-6 of the largest.

    Example:
        >>> import torch
        >>> sparkline([torch.tensor([8.0, 8.0, 4.0, 4.0, 1.0, 1.0, 0.0, 0.0])], width=4)
        '█▄▁ '
    """
    import torch

    curves = torch.stack([s / s[0] if s[0] > 0 else s for s in spectra]).median(dim=0).values
    count = min(width, len(curves))
    edges = [round(i * len(curves) / count) for i in range(count + 1)]
    means = [float(curves[a:b].mean()) for a, b in pairwise(edges)]
    levels = [min(8, max(1, math.ceil(8 * mean - 1e-3))) if mean > 1e-6 else 0 for mean in means]
    return "".join(map(str, levels)) if ascii_only else "".join(_BLOCKS[level] for level in levels)
