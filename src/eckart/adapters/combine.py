"""Several adapters in one: the weighted sum of their updates as a new adapter of low rank.

    Δ = Σ_i w_i Δ_i = left (out, k) right (k, in),   then the best factors of rank r of Δ, if r < k

The sum is exact where every Δ_i has factors and no smaller rank is asked for. It is a PiSSA adapter whose start is
zero, which is what a plain pair of factors is among our methods, so it is trained, saved and converted like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import EckartConfig
from .convert import best_factors
from .layer import EckartLayer, base_weight

if TYPE_CHECKING:
    from .tuner import EckartModel

__all__ = ["add_weighted_adapter", "weighted_delta"]


def weighted_delta(layer: EckartLayer, weights: Mapping[str, float]) -> Tensor | tuple[Tensor, Tensor]:
    """Σ_i w_i Δ_i of one layer, each against the base weight: as factors where all have them, else (out, in).

    Args:
        layer: With at least one of the adapters.
        weights: w_i by adapter name.
    """
    found = [(weights[name], layer.adapters([name])[0]) for name in weights if layer.adapters([name])]
    factors = [adapter.low_rank() for _, adapter in found]
    if all(pair is not None for pair in factors):
        left = torch.cat([w * pair[0] for (w, _), pair in zip(found, factors, strict=True) if pair], dim=1)
        return left, torch.cat([pair[1] for pair in factors if pair])
    base = base_weight(layer.site, layer)
    return torch.stack([w * adapter.delta(base) for w, adapter in found]).sum(dim=0)


@torch.no_grad()
def add_weighted_adapter(
    tuner: EckartModel, weights: Mapping[str, float], name: str, *, rank: int | None = None
) -> dict[str, float]:
    """Put Σ_i w_i Δ_i on the model as the adapter ``name``.

    Args:
        tuner: With the adapters; it is changed once everything is computed.
        weights: w_i by adapter name.
        name: Of the new adapter.
        rank: r at the most; None for the smallest that makes no error.

    Returns:
        ||Δ - left right||_F / ||Δ||_F of every layer.

    Raises:
        ValueError: An unknown adapter, a name that is taken, no adapters, a rank below 1, a weight that is not
            finite, or an adapter that is no linear map or trains modules whole.
    """
    unknown = sorted(set(weights) - set(tuner.peft_config))
    if unknown or not weights:
        raise ValueError(f"no adapter {', '.join(unknown) or 'given'}; there is {', '.join(tuner.peft_config)}")
    if name in tuner.peft_config:
        raise ValueError(f"there is an adapter {name!r} already; choose another name")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    if not torch.tensor(list(weights.values())).isfinite().all():
        raise ValueError(f"weights must be finite, not {list(weights.values())}")
    for key in weights:
        if whole := getattr(tuner.peft_config[key], "modules_to_save", None):
            raise ValueError(
                f"{key} trains {', '.join(sorted(whole)[:3])} whole, which cannot be added; merge it instead"
            )
    layers = {
        key: module
        for key, module in tuner.model.named_modules()
        if isinstance(module, EckartLayer) and module.adapters(list(weights))
    }
    sums = {key: best_factors(weighted_delta(layer, weights), rank) for key, layer in layers.items()}
    first = tuner.peft_config[next(iter(weights))]
    ranks = {key: b.shape[1] for key, (b, _, _) in sums.items()}
    config = EckartConfig(
        method="pissa",
        r=max(ranks.values()),
        target_modules=list(ranks),
        rank_pattern=ranks,
        initialized=True,
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        inference_mode=True,
    )
    tuner.peft_config[name] = config
    tuner.inject_adapter(tuner.model, name)
    for key, layer in layers.items():
        b, a, _ = sums[key]
        (source,) = layer.adapters([next(n for n in weights if layer.adapters([n]))])
        (adapter,) = layer.adapters([name])
        adapter.fill(left=b, right=a, fingerprint=source.fingerprint)
    return {key: error for key, (_, _, error) in sums.items()}
