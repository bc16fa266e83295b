"""Writing an updated weight back without losing small updates.

    bfloat16:  x ↑ or ↓ to a neighbour, with the probability that makes the mean x

Rounding to nearest leaves a bfloat16 weight where it is while its update is below a 256th of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["round_stochastically", "write_back"]


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """x in bfloat16, rounded at random so that its mean is x.

    Args:
        x: float32, any shape.
        generator: Source of randomness, on x's device.

    Example:
        >>> x = torch.full((10_000,), 1 + 2**-9)  # a quarter of the way from 1 to the next bfloat16
        >>> mean = round_stochastically(x, torch.Generator().manual_seed(0)).float().mean()
        >>> abs(float(mean) - float(x[0])) < 1e-4
        True
    """
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    bits = (x.contiguous().view(torch.int32) + noise) & -65536
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)


def write_back(parameter: Tensor, value: Tensor, generator: torch.Generator | None) -> None:
    """Set a parameter in place, to nearest, or at random where it is bfloat16 and a source of randomness is given.

    Args:
        parameter: What this process holds of it.
        value: In the dtype of the arithmetic.
        generator: On the parameter's device.
    """
    if generator is not None and parameter.dtype == torch.bfloat16:
        value = round_stochastically(value.to(torch.float32), generator)
    parameter.copy_(value)
