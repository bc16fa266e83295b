"""DyLoRA: the truncated updates, what a step trains, and one adapter cut to every rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import tiny_models
from eckart.adapters import EckartConfig
from eckart.adapters.dylora import DyLoRA
from eckart.adapters.layer import EckartLayer
from eckart.adapters.site import Site

IDS = torch.arange(24).reshape(2, 12) % 60


def made(method: DyLoRA, rank: int = 4, scale: float = 0.5):
    adapter = method.build(Site("layer", "linear", 12, 10), rank, scale)
    adapter.initialize(torch.zeros(12, 10), None, torch.Generator().manual_seed(0))
    adapter.left.data = torch.randn(12, rank, generator=torch.Generator().manual_seed(1))
    return adapter


def adapted(**options) -> PeftModel:
    config = EckartConfig(method="dylora", r=4, options=options, task_type="CAUSAL_LM", alpha=2.0)
    return get_peft_model(tiny_models.FAMILIES["llama"]().eval(), config)


@pytest.mark.parametrize("b", [1, 2, 3, 4])
@pytest.mark.parametrize("update", ["all", "frozen"])
def test_the_update_of_each_rank(b, update):
    adapter = made(DyLoRA(update=update))
    adapter.drawn = b
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(2))
    left, right = adapter.left.detach().double().numpy(), adapter.right.detach().double().numpy()
    expected = x.double().numpy() @ ((2.0 / b) * left[:, :b] @ right[:b]).T  # alpha = 0.5 * 4
    assert np.abs(adapter.update(x).detach().numpy() - expected).max() < 1e-5
    adapter.update(x).square().sum().backward()
    moved = (adapter.left.grad.abs().sum(dim=0) > 0, adapter.right.grad.abs().sum(dim=1) > 0)
    wanted = torch.arange(4) < b if update == "all" else torch.arange(4) == b - 1
    assert all(torch.equal(part, wanted) for part in moved)


def test_the_start_is_the_base_at_every_rank():
    adapter = made(DyLoRA())
    adapter.initialize(torch.zeros(12, 10), None, torch.Generator().manual_seed(0))
    base = nn.Linear(10, 12)
    x = torch.randn(5, 10)
    for b in (None, 1, 2, 3, 4):
        adapter.drawn = b
        assert torch.equal(adapter(x, base), base(x))
    assert adapter.num_trainable() == DyLoRA().trainable(adapter.site, 4) == 4 * 22


def test_cutting_it_gives_what_was_trained_at_that_rank():
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(2))
    for b in (4, 3, 1):
        adapter = made(DyLoRA())
        adapter.drawn = b
        expected = adapter.update(x).detach()
        adapter.drawn = None
        adapter.truncate(b)
        assert torch.allclose(adapter.update(x), expected, atol=1e-6)
        assert adapter.num_trainable() == b * 22
        assert torch.linalg.matrix_rank(adapter.delta(torch.zeros(1))) <= b


@pytest.mark.parametrize("update", ["all", "frozen"])
def test_what_is_not_drawn_does_not_move_under_momentum_and_decay(update):
    model = adapted(update=update).train()
    coordinator = model.base_model.coordinators()["default"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    seen = set()
    for step in range(1, 13):
        b = coordinator.rank_at(step - 1)
        seen.add(b)
        before = [(a.left.detach().clone(), a.right.detach().clone()) for a in coordinator.members]
        for _ in range(2):  # two micro-batches have the same rank
            model(input_ids=IDS, labels=IDS).loss.backward()
            assert {a.drawn for a in coordinator.members} == {b}
        optimizer.step()
        model.base_model.on_step(step, 12)
        optimizer.zero_grad()
        free = torch.arange(4) < b if update == "all" else torch.arange(4) == b - 1
        for adapter, (left, right) in zip(coordinator.members, before, strict=True):
            assert torch.equal(adapter.left[:, ~free], left[:, ~free])
            assert torch.equal(adapter.right[~free], right[~free])
            assert not torch.equal(adapter.left[:, free], left[:, free])
    assert seen == {1, 2, 3, 4}
    model.eval()
    model(input_ids=IDS)
    assert {a.drawn for a in coordinator.members} == {None}


def test_the_whole_model_is_cut_saved_and_loaded(tmp_path):
    model = adapted()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    full = [a.delta(torch.zeros(1)).detach() for a in model.base_model.coordinators()["default"].members]
    left = [a.left.detach().clone() for a in model.base_model.coordinators()["default"].members]
    model.base_model.truncate(2)
    config = model.peft_config["default"]
    assert (config.r, config.alpha) == (2, 2.0)
    for layer, whole, b in zip((m for m in model.modules() if isinstance(m, EckartLayer)), full, left, strict=True):
        adapter = layer.eckart_adapters["default"]
        assert adapter.scale == 1.0
        assert torch.equal(adapter.left, b[:, :2])
        assert not torch.allclose(adapter.delta(torch.zeros(1)), whole)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_models.FAMILIES["llama"]().eval(), tmp_path).eval()
        assert torch.equal(loaded(input_ids=IDS).logits, expected)


def test_without_alpha_cutting_keeps_alpha_at_the_first_rank():
    model = get_peft_model(tiny_models.FAMILIES["llama"]().eval(), EckartConfig(method="dylora", r=4))
    model.base_model.truncate(1)
    assert (model.peft_config["default"].alpha, model.peft_config["default"].scale_of(1)) == (4.0, 4.0)


def test_wrong_options():
    with pytest.raises(ValueError, match="update must be one of all, frozen"):
        DyLoRA(update="some")
    with pytest.raises(ValueError, match="smallest must be a rank"):
        DyLoRA(smallest=0)
    assert "below smallest" in DyLoRA(smallest=3).check(Site("layer", "linear", 12, 10), 2)
