"""How much each block changes what goes through it: the block influence of ShortGPT, which several methods share by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .groups import evaluating
from .progress import track
from .replay import Batch, Hidden, Replay
from .topology import Block

__all__ = ["block_influence"]


def block_influence(
    model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch], *, progress: bool = True
) -> Tensor:
    """1 minus the mean cosine between what enters a block and what leaves it.

        influence_l = 1 - mean over tokens of <x_l, x_l+1> / (||x_l|| ||x_l+1||)

    Args:
        model: a transformers model.
        blocks: its blocks, as `eckart.models.blocks` gives them.
        batches: keyword arguments of its forward; padding does not count.
        progress: show a bar with the time left.

    Returns:
        (blocks,) float64, from 0 (a block that only scales) to 2.

    Raises:
        ValueError: no batch reaches a block.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from eckart.models import blocks
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=2, n_head=1))
        >>> batch = {"input_ids": torch.arange(6).reshape(1, 6)}
        >>> block_influence(model, blocks(model), [batch], progress=False).shape
        torch.Size([2])

    Reference:
        X. Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, 2024,
        arXiv 2403.03853.
    """
    influence = torch.zeros(len(blocks), dtype=torch.float64)
    with evaluating(model), torch.no_grad():
        replay = Replay(model, blocks, batches)
        hidden: Hidden | None = None
        for index, block in enumerate(track(blocks, "block influence", enabled=progress)):
            entering = replay.enter(index, hidden)
            hidden = replay.advance(index, entering)
            total, tokens = 0.0, 0
            for batch, before, after in zip(replay.batches, entering, hidden, strict=True):
                if before is None or after is None:
                    continue
                cosines = torch.cosine_similarity(before.double(), after.double(), dim=-1)
                mask = batch.get("attention_mask")
                if mask is not None and mask.shape == cosines.shape:
                    cosines = cosines[mask.bool()]
                total, tokens = total + float(cosines.sum()), tokens + cosines.numel()
            if not tokens:
                raise ValueError(f"no calibration token reaches {block.name}; give other data")
            influence[index] = 1 - total / tokens
    return influence
