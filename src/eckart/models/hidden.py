"""Hidden states of a model's backbone at one depth, without its head and without leaving a hook behind.

transformers' own ``output_hidden_states`` installs hooks that stay, keeps the states of all layers, and computes the
logits too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .backbone import backbone_blocks, pretrained_models

__all__ = ["hidden_states"]


class _Found(Exception):
    """Ends a forward pass whose rest is of no interest."""


def hidden_states(model: nn.Module, batch: Mapping[str, Any], layer: int = -1) -> Tensor:
    """Hidden states at one depth.

    Args:
        model: With one transformers model in it, which may be the model itself or inside an adapter.
        batch: Inputs by name; labels are left out.
        layer: 0 are the inputs of the first block, i those of block i; the number of blocks, or -1, the output of the
            backbone after its final norm. Other negative numbers count from there.

    Returns:
        (batch, tokens, d).

    Raises:
        ValueError: There is no such layer, no transformers model, or one that gives no last hidden state.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=2, n_head=2))
        >>> hidden_states(model, {"input_ids": torch.arange(6).reshape(2, 3)}, layer=1).shape
        torch.Size([2, 3, 4])
    """
    if not (found := pretrained_models(model)):
        raise ValueError(f"{type(model).__name__} has no transformers model in it, so no hidden states")
    backbone, repeated = next(iter(found.values())).base_model, backbone_blocks(model)
    if not -len(repeated) - 1 <= layer <= len(repeated):
        raise ValueError(f"layer must be from 0 to {len(repeated)}, or negative from the end, not {layer}")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if layer in (-1, len(repeated)):
        states: Tensor | None = getattr(backbone(**inputs), "last_hidden_state", None)
        if states is None:
            raise ValueError(f"{type(backbone).__name__} gives no last hidden state; give its encoder or decoder alone")
        return states
    seen: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Found

    handle = repeated[layer if layer >= 0 else layer + len(repeated) + 1].module.register_forward_pre_hook(
        take, with_kwargs=True
    )
    try:
        backbone(**inputs)
    except _Found:
        pass
    finally:
        handle.remove()
    return seen[0]
