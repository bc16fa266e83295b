"""Tiny mixtures of experts, their weights, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

import tiny_models
from eckart.models.experts import Expert, expert_banks

FAMILIES = ("mixtral", "qwen3_moe")


def build(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> transformers.PreTrainedModel:
    """Return a tiny mixture in eval mode, the same on every call; an option that is None is left out."""
    model = tiny_models.FAMILIES[family]()
    if options:
        settings = {key: value for key, value in {**model.config.to_dict(), **options}.items() if value is not None}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = type(model)(type(model.config)(**settings)).eval()
            for parameter in model.parameters():
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped kernels do not know float64
    return model.to(dtype)


def batches(model: transformers.PreTrainedModel, sequences: int = 6, tokens: int = 20) -> list[dict[str, Tensor]]:
    """Return one batch to calibrate on."""
    return [tiny_models.inputs(model, sequences, tokens)]


def copied(model: transformers.PreTrainedModel) -> list[list[Expert]]:
    """Return copies of the experts of each layer."""
    return [
        [Expert(*(w.detach().clone() for w in bank.expert(index))) for index in range(bank.count)]
        for bank in expert_banks(model)
    ]


@torch.no_grad()
def make_permuted_copies(model: transformers.PreTrainedModel) -> None:
    """Let all experts of a layer be its first one, with the hidden units in different orders."""
    generator = torch.Generator().manual_seed(3)
    for bank, (first, *_) in zip(expert_banks(model), copied(model), strict=True):
        for index in range(bank.count):
            copy = first.permuted(torch.randperm(bank.width, generator=generator))
            bank.gate_up[index] = torch.cat((copy.gate, copy.up))
            bank.down[index] = copy.down
