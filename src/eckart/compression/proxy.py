"""How good a changed model is, in one number that is quick to get: its accuracy on a few fixed batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..models.calling import AnyBatch, call, logits_of, split_labels
from ..models.groups import evaluating

__all__ = ["Proxy"]


class Proxy:
    """Top-1 accuracy on fixed batches; of two equal ones, the model whose logits are nearer to the dense one's.

        score = correct / N - e / (2 N (1 + e)),   e = ||logits - dense logits||_F / ||dense logits||_F

    The second term is worth less than half an example. Without labels, right is what the dense model says.

    Args:
        model: the dense model, with classes on the second axis of its logits.
        batches: see `eckart.models.calling`.

    Raises:
        ValueError: there are no batches, or the model answers without logits.
    """

    def __init__(self, model: nn.Module, batches: Iterable[AnyBatch]) -> None:
        parts = [split_labels(batch) for batch in batches]
        if not parts:
            raise ValueError("no batches to measure the accuracy on; give labelled pictures, or score=")
        self.inputs = [inputs for inputs, _ in parts]
        self.dense = self._logits(model)
        self.labels = [
            logits.argmax(1) if labels is None else labels.to(logits.device)
            for logits, (_, labels) in zip(self.dense, parts, strict=True)
        ]
        self.count = sum(labels.numel() for labels in self.labels)

    def __call__(self, model: nn.Module) -> float:
        """The score, at most 1; -inf for a model that answers with NaN or Inf."""
        answers = self._logits(model)
        if not all(bool(logits.isfinite().all()) for logits in answers):
            return -torch.inf
        correct = sum(int((one.argmax(1) == labels).sum()) for one, labels in zip(answers, self.labels, strict=True))
        lost = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(answers, self.dense, strict=True))
        whole = sum(float(b.double().square().sum()) for b in self.dense)
        error = (lost / whole) ** 0.5 if whole else 0.0
        return (correct - error / (2 * (1 + error))) / self.count

    def _logits(self, model: nn.Module) -> list[Tensor]:
        with evaluating(model), torch.no_grad():
            return [logits_of(call(model, inputs)) for inputs in self.inputs]
