"""Fine-tuning through the factors of a compressed model moves them, the norms if wanted, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch

import tiny_models
from eckart import compress
from eckart.optim import GaLoreAdamW, factor_groups
from eckart.structures import Structure

IDS = torch.arange(48).reshape(4, 12) * 7 % 60


@pytest.fixture
def compressed():
    model = tiny_models.FAMILIES["llama"]()
    compress(model, "svd", ratio=0.3, form="plain", where="*.mlp.*", progress=False)
    return model


@pytest.mark.parametrize("norms", [True, False])
def test_only_factors_and_norms_move(compressed, norms):
    before = copy.deepcopy(compressed.state_dict())
    optimizer = GaLoreAdamW(factor_groups(compressed, norms=norms, weight_decay=0.1), lr=0.01)
    losses = []
    for _ in range(10):
        loss = compressed(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    inside = tuple(f"{name}." for name, module in compressed.named_modules() if isinstance(module, Structure))
    moved = {key for key, value in compressed.state_dict().items() if not torch.equal(value, before[key])}
    factors = {key for key in before if key.startswith(inside) and before[key].is_floating_point()}
    assert factors
    assert moved == factors | ({key for key in before if "norm" in key} if norms else set())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0][: 1 + norms]


def test_a_dense_model_is_refused_and_left_alone():
    model = tiny_models.FAMILIES["llama"]()
    with pytest.raises(ValueError, match=r"no layer of LlamaForCausalLM is structured; compress it first"):
        factor_groups(model)
    assert all(p.requires_grad for p in model.parameters())
