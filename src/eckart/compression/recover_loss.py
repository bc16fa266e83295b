"""The loss that recovery goes down, over sequences of any lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..models.batches import single_examples, with_labels
from ..models.distill import divergence

__all__ = ["backward", "by_length", "multiplies_bfloat16", "sequences_of"]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 products of its own; where they are emulated, a step takes many times as long.

    Example:
        >>> multiplies_bfloat16(torch.device("meta"))
        False
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def sequences_of(batches: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Each sequence by itself, with labels where it has a token to learn."""
    if any("input_ids" not in batch for batch in batches):
        raise ValueError("recovery is for language models: batches need input_ids")
    rows = [with_labels(row) for row in single_examples(batches)]
    kept = ("input_ids", "attention_mask", "labels")
    # Without a mask all tokens count; with one everywhere, sequences of one length fit together.
    found = [{key: row.get(key, torch.ones_like(row["input_ids"])) for key in kept} for row in rows]
    return [one for one in found if bool(one["labels"][:, 1:].ne(-100).any())]


def by_length(sequences: Sequence[Mapping[str, Tensor]], size: int) -> list[dict[str, Tensor]]:
    """Sequences of one length side by side."""
    alike: dict[int, list[Mapping[str, Tensor]]] = {}
    for one in sequences:
        alike.setdefault(one["input_ids"].shape[1], []).append(one)
    groups = [found[i : i + size] for found in alike.values() for i in range(0, len(found), size)]
    return [{key: torch.cat([one[key] for one in group]) for key in group[0]} for group in groups]


def backward(
    model: nn.Module,
    teacher: nn.Module | None,
    batches: Sequence[Mapping[str, Tensor]],
    device: torch.device,
    *,
    half: bool,
) -> float:
    """Backward through a batch whose sequences may have different lengths; its mean loss a token.

    Args:
        model: to be trained.
        teacher: whose predictions are learnt; None for the text.
        batches: each of one length, together one batch.
        device: of the model.
        half: whether forward and backward are in bfloat16 beside the weights.
    """
    counts = [int(batch["labels"][:, 1:].ne(-100).sum()) for batch in batches]
    total = 0.0
    for batch, count in zip(batches, counts, strict=True):
        inputs = {key: value.to(device) for key, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            if teacher is None:
                loss = model(**inputs).loss * (count / sum(counts))
            else:
                loss = _divergence(model, teacher, inputs) / sum(counts)
        loss.backward()
        total += float(loss.detach())
    return total


def _divergence(model: nn.Module, teacher: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """From the teacher's predictions, summed over the tokens that have a label."""
    shown = {key: value for key, value in inputs.items() if key != "labels"}
    counts = inputs["labels"][:, 1:] != -100
    with torch.no_grad():
        aim = teacher(**shown, use_cache=False).logits[:, :-1][counts]
    return divergence(model(**shown, use_cache=False).logits[:, :-1][counts], aim)
