"""Weights of eight bits: rounded at random so that small updates count, saved, resumed, and made plain again."""

from __future__ import annotations

import copy
import io
import sys

import pytest
import torch
from torch import nn

import tiny_models
from eckart import catalog
from eckart.optim import QGaLoreAdamW, float_weights, int8_weights, low_rank_groups, optimizer_class
from eckart.optim.rounding import dense, write_back

torchao = pytest.importorskip("torchao.prototype.quantized_training")
Int8 = torchao.Int8QuantizedTrainingLinearWeight

METHODS = [row.name for row in catalog.select(family="optim") if row.status != "planned"]
IDS = torch.arange(48).reshape(4, 12) * 7 % 60


def problem() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=generator)
    torch.manual_seed(0)
    linear = nn.Linear(32, 24, bias=False)
    target = linear.weight.detach() + 0.02 * torch.randn(24, 32, generator=generator)
    return nn.Sequential(linear), x, x @ target.mT


def loss_of(linear: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (linear(x) - y).square().mean()


def descend(linear: nn.Module, x: torch.Tensor, y: torch.Tensor, optimizer, steps: int) -> float:
    for _ in range(steps):
        loss_of(linear, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss_of(linear, x, y).detach())


def test_updates_below_half_a_level_count(monkeypatch):
    """Rounded to nearest no code ever changes; rounded at random the run follows the one in 32 bits."""
    options = {"rank": 8, "lr": 1e-3, "scale": 0.25, "update_interval": 20}
    plain, x, y = problem()
    nearest, small = copy.deepcopy(plain), copy.deepcopy(plain)
    assert int8_weights(nearest, "*") == int8_weights(small, "*") == ["0"]
    before, codes = float(loss_of(small, x, y).detach()), small[0].weight.int_data.clone()
    after = descend(small, x, y, QGaLoreAdamW(small.parameters(), **options), 60)
    exact = descend(plain, x, y, QGaLoreAdamW(plain.parameters(), **options), 60)
    assert exact < 0.8 * before
    assert after < 0.85 * before
    assert not torch.equal(small[0].weight.int_data, codes)

    def to_nearest(parameter: torch.Tensor, value: torch.Tensor, *_, **__) -> None:
        parameter.copy_(Int8.from_float(value))

    monkeypatch.setattr("eckart.optim.optimizer.write_back", to_nearest)
    frozen = descend(nearest, x, y, QGaLoreAdamW(nearest.parameters(), **options), 60)
    assert torch.equal(nearest[0].weight.int_data, codes)
    assert frozen > 0.95 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_right_in_the_mean_and_drawn_from_one_source(dtype):
    value = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    parameter = Int8.from_float(torch.zeros(6, 40, dtype=dtype))
    torch.manual_seed(5)
    untouched = torch.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for seed in range(3000):
        write_back(parameter, value, generator.manual_seed(seed))
        drawn.append(dense(parameter))
    assert torch.equal(torch.get_rng_state(), untouched)
    found = torch.stack(drawn)
    assert found.dtype == torch.float32
    level = value.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((found - value).abs() <= level * (1.01 if dtype == torch.float32 else 2)).all())
    assert float(((found.mean(0) - value) / level).abs().max()) < (0.05 if dtype == torch.float32 else 0.3)
    write_back(parameter, value, torch.Generator().manual_seed(7))
    assert torch.equal(dense(parameter), drawn[7])
    assert not torch.equal(drawn[7], drawn[8])


@pytest.mark.parametrize("method", METHODS)
def test_every_optimizer_trains_them(method):
    torch.manual_seed(0)
    model = tiny_models.FAMILIES["llama"]()
    names = int8_weights(model)
    assert len(names) == 14
    optimizer = optimizer_class(method)(low_rank_groups(model, rank=4), lr=0.01)
    losses = []
    for _ in range(15):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert all(isinstance(model.get_submodule(name).weight, Int8) for name in names)


def test_a_resumed_run_is_the_uninterrupted_one():
    def train(model: nn.Module, optimizer, steps: int) -> None:
        for _ in range(steps):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def start() -> tuple[nn.Module, QGaLoreAdamW]:
        torch.manual_seed(0)
        model = tiny_models.FAMILIES["llama"]()
        int8_weights(model)
        return model, QGaLoreAdamW(low_rank_groups(model, rank=4), lr=0.01, update_interval=2)

    model, optimizer = start()
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 3)

    file.seek(0)
    with torch.serialization.safe_globals([Int8]):
        saved = torch.load(file, weights_only=True)
    resumed, again = start()
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    torch.manual_seed(99)  # what is drawn does not depend on it
    train(resumed, again, 3)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(dense(a.detach()), dense(b.detach()))
    assert float_weights(resumed) == float_weights(model)
    assert all(type(p.data) is torch.Tensor and p.requires_grad for p in resumed.parameters())
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, resumed(input_ids=IDS).logits)


def test_only_what_is_meant_is_stored_in_eight_bits():
    model = tiny_models.FAMILIES["llama"]()
    outputs = model(input_ids=IDS).logits.detach()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    assert int8_weights(model, "*.up_proj") == [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    assert [p.requires_grad for p in (model.model.layers[i].mlp.up_proj.weight for i in range(2))] == [False, True]
    assert torch.allclose(model(input_ids=IDS).logits.detach(), outputs, atol=0.05)
    assert float_weights(model) == [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    assert float_weights(model) == []


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.prototype.quantized_training", None)
    model = tiny_models.FAMILIES["llama"]()
    with pytest.raises(ImportError, match=r"pip install 'eckart\[quantized\]'"):
        int8_weights(model)
