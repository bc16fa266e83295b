"""The parameters of a compressed model that fine-tuning is about: those of its structures, and of its norms."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..structures import Structure
from ..structures.factored_experts import FactoredExperts
from .kinds import is_norm

__all__ = ["norm_parameters", "only_gradients_for", "structured_parameters"]


def structured_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Floating-point parameters of all structures by full name, each once.

    Raises:
        ValueError: No layer is structured.

    Example:
        >>> from eckart.structures import Dense
        >>> list(structured_parameters(nn.ModuleDict({"a": Dense(2, 2), "b": nn.Linear(2, 2)})))
        ['a.weight']
    """
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Structure | FactoredExperts):
            for key, parameter in module.named_parameters():
                if parameter.is_floating_point():
                    found.setdefault(id(parameter), (f"{name}.{key}".lstrip("."), parameter))
    if not found:
        raise ValueError(f"no layer of {type(model).__name__} is structured; compress it first, see eckart.compress")
    return dict(found.values())


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of all norms by full name.

    Example:
        >>> list(norm_parameters(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))))
        ['1.weight', '1.bias']
    """
    return {
        f"{name}.{own}": parameter
        for name, module in model.named_modules()
        if is_norm(module)
        for own, parameter in module.named_parameters(recurse=False)
    }


def only_gradients_for(model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
    """Let these parameters of a model have gradients, and no others."""
    chosen = {id(parameter) for parameter in trained}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(id(parameter) in chosen)
