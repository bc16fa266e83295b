"""Empirical Fisher information of linear layers: squared gradients of single sequences, summed.

    f_j = sum_b sum_i (dL_b / dW_ij)^2          W (m, n), f (n,)

The square of a batch's mean gradient is smaller by the batch size and has another pattern, so the
gradient of each sequence b is formed on its own: dL_b/dW = sum_t d_t x_t^T over its tokens, from the
layer's inputs x and the gradients d of its outputs, one backward pass for a few sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..structures.base import wide
from .batches import single_examples
from .groups import evaluating, only_gradients_of
from .progress import track
from .replay import Batch
from .select import LinearRef

if TYPE_CHECKING:
    from .calibrate import Statistics

__all__ = ["fisher"]

# In one backward pass, which keeps all activations, and the logits of a language model several times over.
_TOKENS = 1024


def fisher(
    model: nn.Module, batches: Sequence[Batch], members: Sequence[LinearRef], *, progress: bool = True
) -> dict[str, Statistics]:
    """Per-input Fisher information of each linear, under the model's own loss.

    Args:
        model: a transformers model; dropout is off while this runs, its gradients stay as they were.
        batches: with ``labels``, or with ``input_ids`` only, which then are the labels (next-token loss;
            padding is ignored). One whose sequences have different numbers of labels is taken apart, because
            the model's loss is a mean over all of them.
        members: the linears.
        progress: show a bar with the time left.

    Returns:
        Linear's name -> `Statistics` whose ``fisher`` is (n,) float64 and ``count`` the number of sequences; no
        entry for a linear that the loss does not depend on.

    Raises:
        ValueError: the model returns no loss, or one that is not finite.
    """
    from .calibrate import Statistics

    device = next(model.parameters()).device
    found: dict[str, Statistics] = {}
    inputs: dict[str, list[torch.Tensor]] = {}
    part: Batch = {}

    def remember(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.setdefault(name, []).append((args[0] if args else next(iter(kwargs.values()))).detach())

    def square(name: str, _: nn.Module, __: Any, grads: tuple[torch.Tensor | None, ...]) -> None:
        gradient = grads[0]
        x = inputs[name].pop()
        if gradient is None:
            return
        sequences = _sequences(x, part)
        entry = found.setdefault(name, Statistics())
        total = x.new_zeros(x.shape[-1], dtype=torch.float64)
        x, gradient = (wide(t).reshape(sequences, -1, t.shape[-1]) for t in (x, gradient))
        for sequence, delta in zip(x, gradient, strict=True):
            total += (delta.mT @ sequence).square().sum(0)
        entry.fisher = total if entry.fisher is None else entry.fisher + total
        entry.count += sequences

    handles = []
    for ref in members:
        handles.append(ref.module.register_forward_pre_hook(partial(remember, ref.name), with_kwargs=True))
        handles.append(ref.module.register_full_backward_hook(partial(square, ref.name)))
    try:
        with (
            torch.inference_mode(False),
            evaluating(model),
            only_gradients_of(model, _embedding(model).parameters()),
            torch.enable_grad(),
        ):
            for batch in track(batches, "gradients", enabled=progress):
                for part in _even_parts({k: v.to(device) for k, v in batch.items()}):
                    inputs.clear()
                    _backward(model, part)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _backward(model: nn.Module, batch: Batch) -> None:
    """Run the backward pass for its hooks only: the gradient is asked of the embeddings and thrown away."""
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if loss is None:
        raise ValueError(f"{type(model).__name__} returned no loss; give batches with `labels`")
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"the loss of {type(model).__name__} is {float(loss.detach())} on a batch; check its labels")
    # The mean over the batch's tokens would shrink every sequence's gradient by the batch size.
    torch.autograd.grad(loss * _size(batch), list(_embedding(model).parameters()), allow_unused=True)


def _even_parts(batch: Batch) -> list[Batch]:
    """The batch with labels, in parts of `_TOKENS`; sequence by sequence, if some have fewer labels than others."""
    labels = batch.get("labels")
    if labels is None and "input_ids" in batch:
        labels = batch["input_ids"].clone()
        if "attention_mask" in batch:
            padding = batch["attention_mask"] == 0
            labels[padding] = -100
            labels[:, 1:][padding[:, :-1]] = -100  # nothing to predict the first token after padding from
        batch = {**batch, "labels": labels}
    if labels is None:
        return [batch]
    if bool((labels == -100).any()):
        return [one for one, own in zip(single_examples([batch]), labels, strict=True) if bool((own != -100).any())]
    # The loss is a mean over equally many tokens of each sequence, so parts give the same gradients for less memory.
    return list(single_examples([batch], rows=max(1, _TOKENS // labels[0].numel())))


def _size(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]


def _sequences(x: torch.Tensor, batch: Batch) -> int:
    """Of how many sequences the rows of a layer's input (..., n) are; 1 if that cannot be told from its shape."""
    if x.ndim > 2:
        return x.shape[0]
    # Some models (OPT) flatten the batch before a layer; an expert's tokens are fewer, and of no one sequence.
    size = _size(batch)
    lengths = {1, *(v.shape[1] for v in batch.values() if v.ndim > 1)}
    return size if x.ndim == 2 and any(x.shape[0] == size * length for length in lengths) else 1


def _embedding(model: nn.Module) -> nn.Module:
    find: Any = getattr(model, "get_input_embeddings", None)
    embedding: nn.Module | None = find() if find else None
    if embedding is None:
        raise ValueError(f"{type(model).__name__} has no input embedding to start the backward pass from")
    return embedding
