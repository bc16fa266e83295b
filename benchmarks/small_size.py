"""How much work the jobs on small networks are, and what they share."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """How much work there is: about two minutes a method on one thread."""

    epochs: tuple[int, ...] = (0, 1, 3, 40)
    seeds: int = 5
    batch: int = 32
    train: int = 1000
    validation: int = 300
    steps: int = 1000
    noise: float = 0.4  # pixels are from -1 to 1
    denoised: int = 100  # images that Jacobians are looked at on


SMOKE = Size((0, 1), 2, 20, 60, 20, 3, denoised=4)


def split(size: Size, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test rows."""
    return x[: size.train], x[size.train : size.train + size.validation], x[size.train + size.validation :]


def over_seeds(found: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of each figure."""
    by_name = {name: [one[name] for one in found] for name in found[0]}
    return {
        "test": {name: statistics.mean(values) for name, values in by_name.items()},
        "spread": {name: statistics.stdev(values) for name, values in by_name.items()},
    }


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
