"""What the tests of single optimizers begin with: gradients, and a parameter that is trained on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from eckart.optim import ProjectedOptimizer


def gradients(shape: Sequence[int], steps: int, seed: int = 3) -> list[torch.Tensor]:
    """Normal entries in double precision, the same in every call."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def run_stream(
    kind: type[ProjectedOptimizer], weight: torch.Tensor, stream: Sequence[torch.Tensor], **options
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weight after a step for each gradient, and the state that is kept of it."""
    parameter = nn.Parameter(weight.clone())
    optimizer = kind([parameter], **options)
    for gradient in stream:
        parameter.grad = gradient.clone().to(weight.dtype)
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]
