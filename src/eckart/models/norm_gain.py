"""What a norm multiplies by and whether it takes the mean away, found by trying it: names and formulas differ."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

__all__ = ["norm_gain"]

_LARGE = 1e3  # beside it the small number under the root does not count


@torch.no_grad()
def norm_gain(norm: nn.Module, width: int) -> tuple[Tensor, bool]:
    """The gain of a normalisation, and whether it centres.

        norm(x) = gain * (x - mean) / scale(x) + bias,   the mean only if it centres

    Args:
        norm: LayerNorm or RMSNorm of any family, over the last axis.
        width: of that axis.

    Returns:
        The gain (width,), or of the shape of its weight where that has an axis for heads; float32 or float64.

    Example:
        >>> norm_gain(nn.LayerNorm(4), 4), norm_gain(nn.RMSNorm(2), 2)
        ((tensor([1., 1., 1., 1.]), True), (tensor([1., 1.]), False))
    """
    weight = next(norm.parameters(), torch.zeros(()))
    dtype = torch.promote_types(torch.float32, weight.dtype)
    tried = norm if weight.dtype == dtype else copy.deepcopy(norm).to(dtype)
    x = torch.ones(width, dtype=dtype, device=weight.device)
    x[1::2] = -1
    if width % 2 and width > 1:
        x[-3:] = torch.tensor([1, 1, -2])  # no mean, and no zero, for odd widths either
    x *= _LARGE
    shape = (*weight.shape[:-1], width) if weight.ndim > 1 else (1, width)

    def run(row: Tensor) -> Tensor:
        return tried(row.expand(shape)).reshape(shape if weight.ndim > 1 else (width,))

    plus, minus = run(x), run(-x)
    gain = (plus - minus) / 2 * x.square().mean().sqrt() / x
    shifted = run(x + _LARGE)
    # With the mean left in, a coordinate that the shift takes to zero stays there.
    centred = bool((shifted - plus).abs().max() <= 1e-3 * plus.abs().max().clamp(min=1e-30))
    return gain, centred
