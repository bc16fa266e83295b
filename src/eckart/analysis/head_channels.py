"""The edits of "Talking Heads": rescale a component of what a head writes, or act on its channel while the model runs.

See `eckart.analysis.talking_heads`. Components are numbered by singular values, from the weights as they are now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn

from ..models.head_edits import Edit, changing_output, rescale_written
from ..models.head_maps import HeadLayer, attention_layers
from .composition import ov_components

__all__ = ["edit_component", "steer_component"]

Mode = Literal["keep", "replace", "add"]


def _written(model: nn.Module, layer: int, head: int, component: int | Sequence[int]) -> tuple[HeadLayer, Tensor]:
    """The layer, and the directions (d, k) that components of a head write."""
    layers, _ = attention_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"the model has the attention layers 0 to {len(layers) - 1}, not {layer}")
    place = layers[layer]
    maps = place.maps(torch.float64)
    if not 0 <= head < place.heads:
        raise ValueError(f"{place.name} has the heads 0 to {place.heads - 1}, not {head}")
    found = ov_components(maps.value[head * place.groups // place.heads], maps.output[head])
    wanted = [component] if isinstance(component, int) else list(component)
    if not wanted or not all(0 <= one < len(found.s) for one in wanted) or len(set(wanted)) < len(wanted):
        raise ValueError(f"head {layer}.{head} has the components 0 to {len(found.s) - 1}, not {component}")
    return place, found.u[:, wanted]


def edit_component(model: nn.Module, layer: int, head: int, component: int | Sequence[int], scale: float = 0.0) -> Edit:
    """Rescale components of what a head writes, in its output projection: O <- (I + (scale - 1) v v^T) O.

    Args:
        model: changed in place.
        layer: number of the attention layer, as in the rows of the analysis.
        head: number of the query head.
        component: one or several, as in the rows; numbered as the weights are now.
        scale: 0 removes them, 1 changes nothing.

    Returns:
        The edit, with ``undo()``; also a context manager. The value bias passes through the same matrix.

    Raises:
        ValueError: no such layer, head or component, or the output projection is factored.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=2, n_head=2))
        >>> before = model.transformer.h[0].attn.c_proj.weight.clone()
        >>> with edit_component(model, 0, 1, component=0):
        ...     print(bool(torch.equal(model.transformer.h[0].attn.c_proj.weight, before)))
        False
        >>> torch.equal(model.transformer.h[0].attn.c_proj.weight, before)
        True
    """
    place, directions = _written(model, layer, head, component)
    return rescale_written(place, head, directions, scale)


def steer_component(
    model: nn.Module,
    layer: int,
    head: int,
    component: int | Sequence[int],
    mode: Mode = "keep",
    value: float | Tensor = 0.0,
    position: int | None = None,
) -> AbstractContextManager[None]:
    """Act on the channel of components while the model runs, in a ``with`` statement.

    Args:
        model: its weights stay as they are.
        layer: number of the attention layer.
        head: number of the query head.
        component: one or several.
        mode: "keep" drops all else that the head writes; "replace" sets its coefficients on v to ``value``; "add" adds
            ``value`` v.
        value: a number, or one for each component; v has a sign of its own.
        position: of the one token to act on, from the end if negative; default all.

    Raises:
        ValueError: no such layer, head or component, or another mode.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=2, n_head=2)).eval()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> with torch.no_grad(), steer_component(model, 0, 1, component=[0, 1], mode="keep"):
        ...     kept = model(ids).logits  # both of its two components
        >>> torch.allclose(kept, model(ids).logits, atol=1e-5)
        True
    """
    place, directions = _written(model, layer, head, component)
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "keep": lambda c: c,
        "replace": lambda c: torch.zeros_like(c) + torch.as_tensor(value).to(c),
        "add": lambda c: c + torch.as_tensor(value).to(c),
    }
    if mode not in changes:
        raise ValueError(f"mode must be one of {', '.join(changes)}, not {mode!r}")
    return changing_output(place, head, directions, changes[mode], only=mode == "keep", position=position)
