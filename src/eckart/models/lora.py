"""A plain LoRA of given factors on a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .kinds import linear_kind

__all__ = ["lora_on"]


def lora_on(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], task_type: str | None = None) -> Any:
    """Put a LoRA of PEFT with these factors on a model: W = W0 + B A, a scale of 1.

    Args:
        model: a transformers model without adapters; its layers are wrapped in place, its weights stay.
        factors: B (out, r) and A (r, in) by the name of a linear map, at least one; r may differ.
        task_type: PEFT's, such as "CAUSAL_LM".

    Returns:
        The PEFT model.
    """
    from peft import LoraConfig, get_peft_model

    ranks = {name: b.shape[1] for name, (b, _) in factors.items()}
    largest = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != largest}
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),  # alpha / r stays 1
        target_modules=sorted(factors),
        fan_in_fan_out=any(linear_kind(model.get_submodule(name)) == "conv1d" for name in factors),
        task_type=task_type,
    )
    made: Any = get_peft_model(model, config)
    inner = made.get_base_model()
    with torch.no_grad():
        for name, (b, a) in factors.items():
            layer = inner.get_submodule(name)
            layer.lora_B["default"].weight.copy_(b)
            layer.lora_A["default"].weight.copy_(a)
    return made
