"""Put a structure in the place of a linear map, so that nothing else in the model notices."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ..structures import Structure
from .kinds import linear_kind, owners, untreatable
from .select import LinearRef, nearest

__all__ = ["replace", "swap"]

# Everything that nn.Module keeps about forward and backward hooks. Hooks on the state dict stay behind: they
# speak of the names of the old parameters.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def replace(model: nn.Module, name: str, structure: Structure, *, resize: bool = False) -> None:
    """Put ``structure`` in the place of the linear map ``name``.

    The structure takes over its device, floating-point type, training mode, ``requires_grad``, hooks (a handle
    from ``register_forward_hook`` still removes its hook) and accelerate's device placement. If the old weight is
    on the meta device, the structure stays where it is.

    Before the model's own ``save_pretrained`` is called, :func:`~eckart.models.mark` must tell the model about its
    structures (:func:`~eckart.models.save` does).

    Args:
        model: the model, changed in place.
        name: full name of an ``nn.Linear``, a ``Conv1D`` or a structure.
        structure: what to put there, of the same shape (out, in).
        resize: let the shape be another one; who says so changes what is around it too.

    Raises:
        ValueError: there is no such linear map, its weight is tied to another module, the shapes differ, a bias
            would be lost, or the structure has no data. The model is then unchanged.

    Example:
        >>> from eckart.structures import Dense
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> replace(model, "0", Dense(3, 2, bias=True))
        >>> type(model[0]).__name__
        'Dense'
    """
    old = _linear(model, name)
    _check(model, name, old, structure, resize)
    weight = _a_weight(old)
    if weight.device.type != "meta":
        structure.to(weight.device)
    if weight.is_floating_point():
        structure.to(weight.dtype)
    structure.requires_grad_(weight.requires_grad)
    swap(model, name, structure)


def swap(model: nn.Module, name: str, new: nn.Module) -> None:
    """Exchange the module ``name`` for ``new`` with its hooks and training mode, and check nothing.

    Args:
        model: the model, changed in place.
        name: full name of the module; parts may be numbers, as in ``layers.0``.
        new: the module to put there.
    """
    parent_name, _, key = name.rpartition(".")
    parent, old = model.get_submodule(parent_name), model.get_submodule(name)
    placement = getattr(old, "_hf_hook", None)
    if placement is not None:
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(old)
    new.train(old.training)
    _move_hooks(old, new)
    setattr(parent, key, new)
    if placement is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, _fresh(placement))


def _linear(model: nn.Module, name: str) -> nn.Module:
    try:
        old = model.get_submodule(name)
    except AttributeError:
        known = [key for key, module in model.named_modules() if linear_kind(module)]
        raise ValueError(f"the model has no layer {name!r}{nearest(name, known)}") from None
    if linear_kind(old) is None:
        raise ValueError(f"{name} is a {type(old).__name__}, not a linear layer")
    reason = untreatable(old)
    if reason is not None:
        raise ValueError(f"{name} cannot be replaced: {reason}")
    return old


def _check(model: nn.Module, name: str, old: nn.Module, structure: Structure, resize: bool) -> None:
    kind = linear_kind(old)
    assert kind is not None
    ref = LinearRef(name, old, kind)
    names_of = owners(model)
    for key, parameter in old.named_parameters():
        others = [other for other in names_of[id(parameter)] if other != f"{name}.{key}"]
        if others:
            raise ValueError(f"{name}.{key} is tied with {others[0]}; replacing it would untie them")
    shape = (structure.out_features, structure.in_features)
    if shape != ref.shape and not resize:
        raise ValueError(f"{name} is {ref.shape[0]} x {ref.shape[1]} (out x in), the structure {shape[0]} x {shape[1]}")
    if ref.bias is not None and structure.bias is None:
        raise ValueError(f"{name} has a bias and the structure has none; give the structure a copy of it")
    empty = any(p.device.type == "meta" for p in structure.parameters())
    if empty and _a_weight(old).device.type != "meta":
        raise ValueError(f"the structure for {name} is on the meta device and holds no data; give its factors first")


def _a_weight(old: nn.Module) -> Tensor:
    """Return a parameter that shows the device and data type of the layer."""
    return next((p for p in old.parameters() if p.ndim >= 2), next(old.parameters()))


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    # The dictionaries themselves move, because a handle removes its hook from the dictionary that it knows.
    for attribute in _HOOKS:
        moved, own = getattr(old, attribute), getattr(new, attribute)
        moved.update(own)
        setattr(new, attribute, moved)
        setattr(old, attribute, type(own)())
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook


def _fresh(hook: Any) -> Any:
    """Copy an accelerate hook so that it places the new module's tensors instead of the old one's."""
    hook = copy.copy(hook)
    if hasattr(hook, "hooks"):
        hook.hooks = [_fresh(part) for part in hook.hooks]
    if hasattr(hook, "place_submodules"):
        hook.place_submodules = True  # a structure may consist of others
    if hasattr(hook, "weights_map"):
        hook.weights_map = None  # filled from the new module when the hook is attached
        hook.tied_params_names = set()
    return hook
