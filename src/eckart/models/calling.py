"""Call any torch model on a batch, whatever form the batch has, and read the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["AnyBatch", "call", "logits_of", "split_labels"]

#: Keyword arguments of the forward, its positional arguments, or its only argument.
AnyBatch = Mapping[str, Any] | Sequence[Any] | Tensor


def call(model: nn.Module, batch: AnyBatch) -> Any:
    """The model's answer to a batch.

    Raises:
        ValueError: the batch is neither a mapping, nor a sequence, nor a tensor.

    Example:
        >>> import torch
        >>> model, x = nn.Identity(), torch.ones(1)
        >>> [call(model, batch).item() for batch in (x, (x,), {"input": x})]
        [1.0, 1.0, 1.0]
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return model(*batch)
    raise ValueError(f"a batch must be a tensor, a tuple or a dictionary, not {type(batch).__name__}")


def split_labels(batch: AnyBatch) -> tuple[AnyBatch, Tensor | None]:
    """The inputs of a batch and its labels: the entry "labels", or the second of two tensors.

    Example:
        >>> import torch
        >>> split_labels({"pixel_values": torch.ones(1), "labels": torch.zeros(1)})[1].item()
        0.0
    """
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "labels"}, batch.get("labels")
    if isinstance(batch, Tensor):
        return batch, None
    if len(batch) == 2:
        return batch[:1], batch[1]
    return batch, None


def logits_of(output: Any) -> Tensor:
    """The logits in a model's answer: its `logits`, its first entry, or itself.

    Raises:
        ValueError: there are none.
    """
    found = getattr(output, "logits", output)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise ValueError(f"the model answers with {type(output).__name__}, which holds no logits; give score=")
    return found
