"""Which tokens of an example the loss is about, and how to make it about a fixed number of them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .evaluate import is_causal
from .replay import Batch

__all__ = ["Taken", "keep_answer_tokens", "predicted"]

Taken = Literal["random", "first"]


def predicted(model: nn.Module, labels: Tensor) -> Tensor:
    """The labels (1, T) that the loss counts, as a mask; a causal model never predicts the first token.

    Example:
        >>> predicted(nn.Linear(1, 1), torch.tensor([[5, -100, 7]])).tolist()  # no transformers model: taken as causal
        [[False, False, True]]
    """
    counted = labels != -100
    if is_causal(model) and counted.ndim == 2:
        counted[:, 0] = False
    return counted


def keep_answer_tokens(
    model: nn.Module,
    example: Batch,
    count: int | None = None,
    *,
    taken: Taken = "random",
    generator: torch.Generator | None = None,
) -> Batch | None:
    """An example whose loss is about ``count`` tokens of its answer.

    For a causal model what follows the last of them is cut off: nothing that counts depends on it.

    Args:
        model: The example's model.
        example: A batch of one text, with labels.
        count: How many; None for all.
        taken: Drawn at random without repetition, or the first.
        generator: On the CPU, of the draw.

    Returns:
        The example with the other labels -100; None if it has fewer, or none.

    Example:
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> example = {"input_ids": ids, "labels": torch.tensor([[-100, 2, 3, 4]])}
        >>> keep_answer_tokens(nn.Linear(1, 1), example, 1, taken="first")
        {'input_ids': tensor([[1, 2]]), 'labels': tensor([[-100,    2]])}
    """
    labels = example["labels"]
    mask = predicted(model, labels)
    places = mask.flatten().nonzero().flatten()
    if len(places) < (count or 1):
        return None
    if count is not None:
        order = torch.randperm(len(places), generator=generator).to(places.device) if taken == "random" else slice(None)
        mask = torch.zeros_like(mask)
        mask.view(-1)[places[order][:count]] = True
    kept = {**example, "labels": labels.masked_fill(~mask, -100)}
    if not is_causal(model) or labels.ndim != 2:
        return kept
    end = int(mask[0].nonzero().max()) + 1
    return {key: t[:, :end] if t.shape[:2] == labels.shape else t for key, t in kept.items()}
