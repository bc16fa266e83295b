"""Estimate the statistics of batch normalisations again, once the layers before them have changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from .calling import AnyBatch, call
from .groups import evaluating

__all__ = ["batch_norms", "reestimate", "statistics_kept"]


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch normalisations that keep running statistics."""
    kind = nn.modules.batchnorm._BatchNorm
    return [m for m in model.modules() if isinstance(m, kind) and m.running_mean is not None]


def reestimate(model: nn.Module, batches: Iterable[AnyBatch]) -> None:
    """Set running means and variances to the plain averages over these batches; nothing else changes.

    Example:
        >>> norm, x = nn.BatchNorm1d(1), torch.tensor([[1.0], [3.0]])
        >>> reestimate(norm, [x])
        >>> norm.running_mean.item(), norm.running_var.item()
        (2.0, 2.0)
    """
    norms = batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    with evaluating(model), torch.no_grad():
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.train()
            for batch in batches:
                call(model, batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


@contextlib.contextmanager
def statistics_kept(model: nn.Module) -> Iterator[list[bool]]:
    """Put the running statistics back at the end, unless the yielded list has been given an element."""
    before = [{key: value.clone() for key, value in norm.named_buffers()} for norm in batch_norms(model)]
    keep: list[bool] = []
    yield keep
    if not keep:
        for norm, buffers in zip(batch_norms(model), before, strict=True):
            for key, value in buffers.items():
                norm.get_buffer(key).copy_(value)
