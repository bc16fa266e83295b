"""Shapes of single modules that differ from what the model's configuration says, and how a checkpoint carries them.

A method that removes part of a head, heads, or experts leaves modules that `config.json` does not describe: heads of
another width, fewer rows in a bank of experts. A `Geometry` says what is different, is written beside the structures,
and is put on again by plain ``from_pretrained`` before the weights are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["Geometry", "geometries", "geometry_of", "remove_geometry", "set_geometry"]

_KEY = "eckart_geometry"
_HANDLES = "_eckart_geometry_handles"


@dataclass(frozen=True)
class Geometry:
    """What one module must know about its own shape.

    Attributes:
        attributes: Attribute of the module -> its value, such as ``{"head_dim": 48}``.
        rotary: Which coordinates of the rotary cosines and sines (head_dim,) attention still has, in its order;
            None for all.
        shapes: Parameter of the module -> its shape, where weights are not in linears (banks of experts).
        experts: Which stored expert answers for each expert that the router knows; None for one each.
    """

    attributes: Mapping[str, int] = field(default_factory=dict)
    rotary: tuple[int, ...] | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    experts: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data, without what is as it was."""
        return {key: value for key, value in asdict(self).items() if value not in (None, {})}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Geometry:
        """What :meth:`to_json` gave, possibly through JSON.

        Raises:
            ValueError: an entry that this version does not know.
        """
        unknown = sorted(set(data) - {"attributes", "rotary", "shapes", "experts"})
        if unknown:
            raise ValueError(f"unknown entries in a module's geometry: {', '.join(unknown)}; a newer Eckart wrote it")
        return cls(
            attributes=dict(data.get("attributes", {})),
            rotary=None if data.get("rotary") is None else tuple(data["rotary"]),
            shapes={name: tuple(shape) for name, shape in data.get("shapes", {}).items()},
            experts=None if data.get("experts") is None else tuple(data["experts"]),
        )


def set_geometry(module: nn.Module, geometry: Geometry) -> None:
    """Put a geometry on a module, in the place of the one it has.

    Parameters that already have the stated shape keep their values; the others are made anew and hold nothing, for a
    checkpoint to be loaded into.

    Args:
        module: changed in place.
        geometry: what is different about it.

    Raises:
        ValueError: the module has no such attribute or parameter; it is unchanged.

    Example:
        >>> from transformers import LlamaConfig
        >>> from transformers.models.llama.modeling_llama import LlamaAttention
        >>> attention = LlamaAttention(LlamaConfig(hidden_size=16, num_attention_heads=2), layer_idx=0)
        >>> set_geometry(attention, Geometry({"head_dim": 4}, rotary=(0, 1, 4, 5)))
        >>> attention.head_dim, geometry_of(attention).rotary
        (4, (0, 1, 4, 5))
    """
    missing = [name for name in (*geometry.attributes, *geometry.shapes) if not hasattr(module, name)]
    if missing:
        raise ValueError(f"{type(module).__name__} has no {', '.join(missing)}; transformers may have changed it")
    remove_geometry(module)
    for name, value in geometry.attributes.items():
        setattr(module, name, value)
    for name, shape in geometry.shapes.items():
        old = module.get_parameter(name)
        if old.shape != shape:
            setattr(module, name, nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad))
    handles = []
    if geometry.rotary is not None:
        handles.append(module.register_forward_pre_hook(_rotate_by(geometry.rotary), with_kwargs=True))
    if geometry.experts is not None:
        handles.append(module.register_forward_pre_hook(_answer_by(geometry.experts), with_kwargs=True))
    module.__dict__.update({_KEY: geometry, _HANDLES: handles})


def remove_geometry(module: nn.Module) -> None:
    """Take a geometry off a module; attributes and shapes that it set stay as they are."""
    for handle in module.__dict__.pop(_HANDLES, ()):
        handle.remove()
    module.__dict__.pop(_KEY, None)


def geometry_of(module: nn.Module) -> Geometry | None:
    """The geometry that was put on a module, or None."""
    found = module.__dict__.get(_KEY)
    assert found is None or isinstance(found, Geometry)
    return found


def geometries(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The geometry of every module that has one, by full name, as plain JSON data."""
    found = ((name, geometry_of(module)) for name, module in model.named_modules())
    return {name: geometry.to_json() for name, geometry in found if geometry is not None}


def _rotate_by(kept: tuple[int, ...]) -> Any:
    """A hook that hands attention the cosines and sines of the coordinates it has."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # By keyword in every decoder layer of transformers; by place for whoever calls attention alone.
        place = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
        if place is None:
            raise ValueError(f"{type(module).__name__} got no rotary embeddings, which its kept coordinates refer to")
        chosen = tuple(table[..., torch.tensor(kept, device=table.device)] for table in place)
        if "position_embeddings" in kwargs:
            return args, {**kwargs, "position_embeddings": chosen}
        return (args[0], chosen, *args[2:]), kwargs

    return hook


def _answer_by(stored: tuple[int, ...]) -> Any:
    """A hook that turns the router's numbers of experts into those of the stored ones."""
    # transformers numbers "no expert here" after the last one.
    numbers = (*stored, max(stored) + 1)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "top_k_index" in kwargs:
            chosen = kwargs["top_k_index"]
            return args, {**kwargs, "top_k_index": torch.tensor(numbers, device=chosen.device)[chosen]}
        hidden, chosen, *rest = args
        return (hidden, torch.tensor(numbers, device=chosen.device)[chosen], *rest), kwargs

    return hook
