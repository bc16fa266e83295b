"""Empirical Fisher information of linear layers: squared gradients of single sequences, summed.

    f_j = sum_b sum_i (dL_b / dW_ij)^2          W (m, n), f (n,)

The square of a batch's mean gradient is smaller by the batch size and has another pattern, so the
gradient of each sequence b is formed on its own: dL_b/dW = sum_t d_t x_t^T over its tokens, from the
layer's inputs x and the gradients d of its outputs, one backward pass a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .groups import evaluating
from .progress import track
from .replay import Batch
from .select import LinearRef

if TYPE_CHECKING:
    from .calibrate import Statistics

__all__ = ["fisher"]


def fisher(
    model: nn.Module, batches: Sequence[Batch], members: Sequence[LinearRef], *, progress: bool = True
) -> dict[str, Statistics]:
    """Per-input Fisher information of each linear, under the model's own loss.

    Args:
        model: a transformers model; dropout is off while this runs, its gradients stay as they were.
        batches: with ``labels``, or with ``input_ids`` only, which then are the labels (next-token loss;
            padding is ignored).
        members: the linears.
        progress: show a bar with the time left.

    Returns:
        Linear's name -> `Statistics` whose ``fisher`` is (n,) float64 and ``count`` the number of sequences.

    Raises:
        ValueError: if the model returns no loss.
    """
    from .calibrate import Statistics

    device = next(model.parameters()).device
    found = {ref.name: Statistics() for ref in members}
    inputs: dict[str, list[torch.Tensor]] = {}

    def remember(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.setdefault(name, []).append(args[0].detach())

    def square(name: str, _: nn.Module, __: Any, grads: tuple[torch.Tensor | None, ...]) -> None:
        gradient = grads[0]
        x = inputs[name].pop()
        if gradient is None:
            return
        # A layer that sees (tokens, n) without a batch axis counts as one sequence.
        x, gradient = (t if t.ndim == 3 else t.reshape(1, -1, t.shape[-1]) for t in (x, gradient))
        entry = found[name]
        total = x.new_zeros(x.shape[-1], dtype=torch.float64)
        for sequence, delta in zip(x.float(), gradient.float(), strict=True):
            total += (delta.mT @ sequence).square().sum(0)
        entry.fisher = total if entry.fisher is None else entry.fisher + total
        entry.count += x.shape[0]

    handles = []
    for ref in members:
        handles.append(ref.module.register_forward_pre_hook(partial(remember, ref.name)))
        handles.append(ref.module.register_full_backward_hook(partial(square, ref.name)))
    try:
        with evaluating(model), _only_embedding_requires_grad(model), torch.enable_grad():
            for batch in track(batches, "gradients", enabled=progress):
                inputs.clear()
                _backward(model, {k: v.to(device) for k, v in batch.items()})
    finally:
        for handle in handles:
            handle.remove()
    return found


def _backward(model: nn.Module, batch: Batch) -> None:
    """Run the backward pass for its hooks only: the gradient is asked of the embeddings and thrown away."""
    if "labels" not in batch and "input_ids" in batch:
        labels = batch["input_ids"].clone()
        if "attention_mask" in batch:
            labels[batch["attention_mask"] == 0] = -100
        batch = {**batch, "labels": labels}
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if loss is None:
        raise ValueError(f"{type(model).__name__} returned no loss; give batches with `labels`")
    # The mean over the batch's tokens would shrink every sequence's gradient by the batch size.
    sequences = next(iter(batch.values())).shape[0]
    torch.autograd.grad(loss * sequences, list(_embedding(model).parameters()), allow_unused=True)


def _embedding(model: nn.Module) -> nn.Module:
    find: Any = getattr(model, "get_input_embeddings", None)
    embedding: nn.Module | None = find() if find else None
    if embedding is None:
        raise ValueError(f"{type(model).__name__} has no input embedding to start the backward pass from")
    return embedding


@contextlib.contextmanager
def _only_embedding_requires_grad(model: nn.Module) -> Iterator[None]:
    """Let gradients flow through every layer without one being made for every weight."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    _embedding(model).requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
