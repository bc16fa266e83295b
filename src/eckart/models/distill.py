"""Train a small language model to predict what a large one predicts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from .groups import evaluating
from .progress import track

__all__ = ["distill", "distillation_loss", "divergence"]


def divergence(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """How far predictions are from the teacher's softened ones, T^2 KL(softmax(z_T / T) || softmax(z_S / T)).

    Args:
        student: z_S (tokens, vocabulary).
        teacher: z_T of the same shape.
        temperature: T.

    Returns:
        The sum over the tokens, in float32 or wider.

    Example:
        >>> z = torch.tensor([[0.0, 1.0]])
        >>> float(divergence(z, z + 3))  # softmax does not see a shift
        0.0
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    ours, theirs = (log_softmax(z.to(wide) / temperature, dim=-1) for z in (student, teacher))
    return temperature**2 * kl_div(ours, theirs, reduction="sum", log_target=True)


def distillation_loss(
    student: Tensor, teacher: Tensor, ids: Tensor, mask: Tensor, *, temperature: float, task_weight: float
) -> Tensor:
    """Cross entropy with the text, and divergence from the teacher's softened predictions.

        (1 - a) CE(z_S, next token) + a T^2 KL(softmax(z_T / T) || softmax(z_S / T)),      1 - a = task_weight

    Args:
        student: z_S (batch, length, vocabulary).
        teacher: z_T of the same shape.
        ids: (batch, length) the tokens.
        mask: (batch, length) bool, the tokens that are not padding; both means are over tokens that count.
        temperature: T.
        task_weight: 1 - a.

    Returns:
        The loss, in float32 or wider.

    Example:
        >>> z = torch.zeros(1, 2, 4)
        >>> ids, mask = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
        >>> loss = distillation_loss(z, z, ids, mask, temperature=2.0, task_weight=0.5)
        >>> round(float(loss), 4)  # half of log 4: the two agree, and know nothing
        0.6931

    Reference:
        G. Hinton, O. Vinyals, J. Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    apart = divergence(student[mask], teacher[mask], temperature=temperature) / max(int(mask.sum()), 1)
    known = mask[:, :-1] & mask[:, 1:]
    predicted = int(known.sum())
    task = cross_entropy(student[:, :-1][known].to(wide), ids[:, 1:][known], reduction="sum") / max(predicted, 1)
    return task_weight * task + (1 - task_weight) * apart


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    steps: int,
    learning_rate: float,
    temperature: float = 2.0,
    task_weight: float = 0.3,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Train a causal language model in place on batches of token ids, with AdamW at a constant learning rate.

    Dropout stays off and gradients are clipped to norm 1. Weights in half precision are trained in float32 and
    rounded at the end: steps this small would be lost in bfloat16.

    Args:
        student: is trained, all of it; left in eval mode.
        teacher: is only read.
        batches: ``input_ids`` and perhaps ``attention_mask``; gone through in a new random order each time.
        steps: one batch each.
        learning_rate: of AdamW.
        temperature: see `distillation_loss`.
        task_weight: see `distillation_loss`.
        seed: of the order of the batches.
        progress: show a bar with the time left.

    Returns:
        The loss before each step.

    Raises:
        RuntimeError: the loss is no number any more.
    """
    types = {name: parameter.dtype for name, parameter in student.named_parameters()}
    device = next(student.parameters()).device
    losses: list[float] = []
    with evaluating(teacher), torch.enable_grad():
        student.eval()
        _retype(student, {name: torch.promote_types(dtype, torch.float32) for name, dtype in types.items()})
        optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0)
        order = _order(len(batches), steps, seed)
        for number in track(list(order), "distill", enabled=progress):
            batch = {key: value.to(device) for key, value in batches[number].items() if key != "labels"}
            ids = batch["input_ids"]
            mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
            with torch.no_grad():
                target = teacher(**batch, use_cache=False).logits
            loss = distillation_loss(
                student(**batch, use_cache=False).logits,
                target.detach(),
                ids,
                mask,
                temperature=temperature,
                task_weight=task_weight,
            )
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"the loss of distillation step {len(losses)} is {losses[-1]}; lower learning_rate")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()
    _retype(student, types)
    return losses


def _retype(model: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """The parameters alone: rotary frequencies are buffers, and float32 in a model of any type."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(types[name])


def _order(count: int, steps: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    left: list[int] = []
    for _ in range(steps):
        left = left or torch.randperm(count, generator=generator).tolist()
        yield left.pop(0)
