"""One check that every verb makes first: a single NaN spoils everything computed from it."""

from __future__ import annotations

from torch import Tensor, nn

from ..linalg import all_finite

__all__ = ["check_finite", "check_weight"]


def check_finite(model: nn.Module) -> None:
    """Refuse a model with NaN or Inf in any weight: one is enough to spoil the inputs of all layers after it.

    Weights on the meta device are checked when they are read.

    Raises:
        ValueError: naming the first such weight.
    """
    for name, weight in model.named_parameters():
        if weight.device.type != "meta":
            check_weight(name, weight)


def check_weight(name: str, weight: Tensor) -> None:
    """Refuse one weight with NaN or Inf.

    Raises:
        ValueError: naming it.
    """
    if not all_finite(weight):
        raise ValueError(f"{name} has NaN or Inf in it; repair or re-download the checkpoint")
