"""What counts as a linear map, decided from the structure of a module and never from a model's name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..structures import Structure

__all__ = ["Kind", "is_four_bit", "is_norm", "linear_kind", "owners", "untreatable"]

Kind = Literal["linear", "conv1d", "structure"]


def linear_kind(module: nn.Module) -> Kind | None:
    """Say which kind of linear map ``module`` is: y = x W^T + b with W of shape (out, in).

    Args:
        module: any module.

    Returns:
        ``"structure"`` for a :class:`~eckart.structures.Structure`, ``"conv1d"`` for transformers' ``Conv1D``
        (which stores W^T), ``"linear"`` for ``nn.Linear`` and its subclasses, else None.

    Example:
        >>> linear_kind(nn.Linear(3, 2)), linear_kind(nn.Embedding(3, 2))
        ('linear', None)
    """
    if isinstance(module, Structure):
        return "structure"
    if isinstance(module, Conv1D):
        return "conv1d"
    return "linear" if isinstance(module, nn.Linear) else None


def untreatable(module: nn.Module, *, quantized: bool = False) -> str | None:
    """Say why a linear module cannot be replaced by a factored one, or None if it can.

    Args:
        module: a module for which :func:`linear_kind` is not None.
        quantized: whether a weight stored in few bits will do, as it does for what is only added to the layer.

    Returns:
        The reason, as the end of the sentence "left alone: ...".

    Example:
        >>> untreatable(nn.Linear(3, 2)) is None
        True
        >>> untreatable(nn.MultiheadAttention(4, 2).out_proj)
        'nn.MultiheadAttention reads this weight without calling the module'
    """
    if isinstance(module, Structure):
        return None
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads this weight without calling the module"
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if not weight.is_floating_point() or weight.element_size() < 2:
        return None if quantized else f"stored as {weight.dtype}; dequantize the model first"
    if isinstance(module, nn.Linear) and not _is_plain(type(module).forward):
        return f"{type(module).__name__} computes more than a linear map"
    return None


@functools.cache
def _is_plain(forward: Callable[..., Any]) -> bool:
    """Tell whether the ``forward`` of a subclass of ``nn.Linear`` is x W^T + b.

    Subclasses override it for a router's softmax as well as for another way to write the same product.
    So the method is tried on a bare object that has a weight, a bias and nothing else.
    """
    if forward is nn.Linear.forward:
        return True
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.25, 4.0, -1.0]])
    bias = torch.tensor([0.75, -3.0])
    x = torch.tensor([[2.0, 1.0, -1.0], [0.5, -0.25, 8.0]])
    stand_in = SimpleNamespace(weight=weight, bias=bias, in_features=3, out_features=2)
    try:
        result = forward(stand_in, x)
    except Exception:
        return False
    return isinstance(result, torch.Tensor) and torch.equal(result, x @ weight.mT + bias)


def is_four_bit(module: nn.Module) -> bool:
    """Tell whether bitsandbytes holds the weight of a module in four bits.

    Such a layer reorders its weight for good at its first use in evaluation on a processor, and passes no gradients
    from then on; what is to be trained has to be kept from it.

    Example:
        >>> is_four_bit(nn.Linear(3, 2))
        False
    """
    return hasattr(getattr(module, "weight", None), "quant_state")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation, known by its class: in structure a layer scale is no different.

    Example:
        >>> is_norm(nn.LayerNorm(3)), is_norm(nn.Linear(3, 3))
        (True, False)
    """
    return "norm" in type(module).__name__.lower()


def owners(model: nn.Module) -> dict[int, list[str]]:
    """List, for every parameter object, all names under which the model reaches it.

    Args:
        model: any module; one on the meta device too.

    Returns:
        ``id(parameter)`` to its full names. More than one name means a tied weight or a shared module.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        >>> model[1].weight = model[0].weight
        >>> list(owners(model).values())
        [['0.weight', '1.weight']]
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names
