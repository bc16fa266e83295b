"""Checking a saved optimizer state before it replaces the one in use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from .optimizer import ProjectedOptimizer

__all__ = ["check_state", "copied", "places"]


def copied(kept: dict[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """A copy of a parameter's saved tensors on its device, every dtype as it is; what counts steps stays where it is.

    Args:
        kept: Name -> tensor.
        parameter: Whose state it is.
    """

    def copy(name: str, value: Tensor) -> Tensor:
        counts = name == "step" or (value.ndim == 0 and not value.is_floating_point())
        stays = counts or isinstance(value, DTensor)
        return value.detach().clone() if stays else value.to(parameter.device, copy=True)

    return {name: copy(name, value) for name, value in kept.items()}


def check_state(optimizer: ProjectedOptimizer, saved: dict[str, Any]) -> None:
    """Refuse a state that is not this optimizer's.

    Raises:
        ValueError: Another optimizer, other numbers of parameters, or tensors of other names and shapes.
    """
    groups, here = saved["param_groups"], optimizer.param_groups
    theirs, ours = {group.get("optimizer", "another optimizer") for group in groups}, type(optimizer).__name__
    if theirs != {ours}:
        raise ValueError(f"the saved state is of {', '.join(sorted(theirs))}, not of {ours}")
    sizes = [[len(group["params"]) for group in side] for side in (groups, here)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the saved state has groups of {sizes[0]} parameters, this optimizer of {sizes[1]}")
    for key, (name, parameter, group) in places(optimizer, saved).items():
        if (kept := saved["state"].get(key)) is None:
            continue
        theirs_of = next(one for one in groups if key in one["params"])
        options = {**group, **{name: value for name, value in theirs_of.items() if name != "params"}}
        expected = {k: tuple(v.shape) for k, v in optimizer.new_state(_meta(parameter), options).items()}
        found = {k: tuple(v.shape) for k, v in kept.items()}
        if found != expected:
            raise ValueError(f"the saved state of {name} has {found}, but this model needs {expected}")


def places(optimizer: ProjectedOptimizer, saved: dict[str, Any]) -> dict[Any, tuple[str, Tensor, dict[str, Any]]]:
    """(name, parameter, group) by the key that a saved state uses for it: a number, or a name in distributed ones."""
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    return {key: entry[:3] for key, entry in zip(keys, optimizer.members(), strict=True)}


def _meta(parameter: Tensor) -> Tensor:
    return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
