"""The handwritten digits of scikit-learn, 8 x 8 pixels, which three of the cases share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Examples


def digits() -> Examples:
    """All 1797 of them in a fixed random order, (n, 1, 8, 8) from -1 to 1."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Examples(images, torch.from_numpy(found.target).long())[order]


def enlarged(images: Tensor, side: int) -> Tensor:
    """With ``side`` pixels a side, smoothly."""
    return F.interpolate(images, size=(side, side), mode="bilinear")
