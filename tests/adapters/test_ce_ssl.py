"""CE-SSL: layers left out at random, two ranks by gradient, and batch statistics of unlabelled data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

import tiny_models
from eckart import adapt
from eckart.adapters import EckartConfig
from eckart.adapters.ce_ssl import CESSL, with_unlabelled
from eckart.adapters.site import Site
from eckart.models.calibrate import Statistics

IDS = torch.arange(24).reshape(2, 12) % 60


def made(drop: float = 0.2):
    adapter = CESSL(drop=drop).build(Site("layer", "linear", 12, 10), 3, 0.5)
    adapter.initialize(torch.zeros(12, 10), None, torch.Generator().manual_seed(0))
    adapter.left.data = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    return adapter


def test_in_out_and_expected():
    adapter, base = made(), nn.Linear(10, 12)
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(2))
    product = adapter.left.detach().double().numpy() @ adapter.right.detach().double().numpy()
    plain = base(x).detach().double().numpy()
    for active, factor in ((True, 0.5), (False, 0.0), (None, 0.8 * 0.5)):
        adapter.set_active(active)
        expected = plain + factor * x.double().numpy() @ product.T
        assert np.abs(adapter(x, base).detach().numpy() - expected).max() < 1e-5
    adapter.set_active(None)
    assert np.abs(adapter.delta(torch.zeros(1)).detach().numpy() - 0.4 * product).max() < 1e-6
    assert adapter.num_trainable() == CESSL().trainable(adapter.site, 3) == 3 * 22


def test_nothing_is_left_out_without_a_probability():
    method = CESSL(drop=0.0)
    assert method.coordinate({"layer": made(0.0)}, 0) is None


def test_the_draws_of_a_model():
    model = get_peft_model(
        tiny_models.FAMILIES["llama"](), EckartConfig(method="ce-ssl", r=4, options={"drop": 0.3}, seed=5)
    ).train()
    coordinator = model.base_model.coordinators()["default"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    shares, patterns = [], set()
    for step in range(1, 41):
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            pattern = tuple(adapter.active for adapter in coordinator.members)
        # Two micro-batches of a step agree, and what is out gets no gradient.
        assert pattern == tuple(adapter.active for adapter in coordinator.members)
        for adapter in coordinator.members:
            assert (adapter.left.grad is None) is (not adapter.active)
        optimizer.step()
        model.base_model.on_step(step, 40)
        optimizer.zero_grad()
        shares.append(1 - sum(pattern) / len(pattern))
        patterns.add(pattern)
    # 40 steps of 14 layers: a share of 0.3 with deviation 0.02.
    assert abs(np.mean(shares) - 0.3) < 0.07
    assert len(patterns) > 30
    model.eval()
    model(input_ids=IDS)
    assert {adapter.active for adapter in coordinator.members} == {None}


@pytest.mark.parametrize("importance", ["taylor", "fisher"])
def test_the_two_ranks(importance):
    generator = torch.Generator().manual_seed(0)
    names = [f"layer{i}" for i in range(5)]
    sites = {name: Site(name, "linear", 6, 4) for name in names}
    weights = {name: torch.randn(6, 4, generator=generator) for name in names}
    gradients = {name: torch.randn(6, 4, generator=generator).double() for name in names}
    statistics = {name: Statistics(fisher=gradients[name].square().sum(dim=0), count=1) for name in names}
    ranks = CESSL(low_share=0.5, importance=importance).ranks(sites, statistics, 8, lambda name: weights[name])
    scores = {}
    for name in names:
        by_column = gradients[name].numpy() ** 2
        columns = by_column.sum(axis=0) * (
            (weights[name].double().numpy() ** 2).mean(axis=0) if importance == "taylor" else 1
        )
        scores[name] = columns.sum() / 24
    low = sorted(names, key=lambda name: scores[name])[:2]  # floor(0.5 * 5)
    assert ranks == {name: 4 if name in low else 8 for name in names}


def test_ranks_come_from_one_pass_over_the_data():
    data = [{"input_ids": IDS, "labels": IDS}]
    options = {"importance": "taylor", "low_share": 0.6}
    model = adapt(tiny_models.FAMILIES["llama"](), "ce-ssl", rank=4, data=data, options=options, progress=False)
    pattern = model.peft_config["default"].rank_pattern
    assert sorted(set(pattern.values())) == [2, 4]
    assert sum(rank == 2 for rank in pattern.values()) == int(0.6 * len(pattern))
    with pytest.raises(ValueError, match="starts from data"):
        adapt(tiny_models.FAMILIES["llama"](), "ce-ssl", rank=4, options=options, progress=False)


def test_unlabelled_data_moves_the_batch_statistics_and_nothing_else():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 4, (1, 3)), nn.BatchNorm2d(4), nn.ReLU())
    labelled, unlabelled = torch.randn(3, 1, 1, 20), 4 + torch.randn(5, 1, 1, 20)
    encoder.train()
    with with_unlabelled(encoder, unlabelled):
        together = encoder(labelled)
    assert together.shape == (3, 4, 1, 18)
    hidden = encoder[0](torch.cat([labelled, unlabelled]))
    mean, variance = hidden.mean((0, 2, 3)), hidden.var((0, 2, 3), correction=0)
    expected = ((hidden - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt())[:3].relu()
    assert torch.allclose(together, expected, atol=1e-5)
    encoder.eval()
    alone = encoder(labelled)
    with with_unlabelled(encoder, unlabelled):
        assert torch.allclose(encoder(labelled), alone, atol=1e-6)
    assert encoder(labelled).shape == alone.shape  # the hooks are gone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": 1.0}, "drop must be a probability below 1"),
        ({"low_share": 1.2}, "low_share must be a share"),
        ({"importance": "size"}, "importance must be one of"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        CESSL(**options)


def test_the_merged_weight_is_the_expected_one_right_after_a_training_step():
    adapter = made(drop=0.5)
    expected = 0.5 * 0.5 * adapter.left.detach() @ adapter.right.detach()
    for active in (True, False, None):
        adapter.set_active(active)
        assert torch.allclose(adapter.delta(torch.zeros(1)).detach(), expected, atol=1e-6)


def test_a_step_with_every_layer_left_out_has_a_gradient_of_zero():
    adapter, base, x = made(drop=0.9), nn.Linear(10, 12).requires_grad_(False), torch.randn(4, 10)
    coordinator = CESSL(drop=0.9).coordinate({"layer": adapter}, seed=0)
    out = 0
    for step in range(20):
        coordinator.on_step(step, 20)
        coordinator.before_forward({}, training=True)
        adapter.zero_grad()
        y = adapter(x, base)
        y.sum().backward()
        if adapter.scale == 0:
            out += 1
            assert torch.equal(y, base(x))
            assert not adapter.left.grad.any()
            assert not adapter.right.grad.any()
    assert 10 < out < 20


def test_the_order_is_that_of_the_products_also_for_layers_of_other_heights():
    generator = torch.Generator().manual_seed(0)
    # Layer "tall" has the larger weight norms, "wide" the larger mean (W G)^2 by a factor of about 3.
    weights = {"tall": 0.5 * torch.randn(256, 64, generator=generator), "wide": torch.randn(4, 64, generator=generator)}
    gradients = {name: torch.randn(w.shape, generator=generator).double() for name, w in weights.items()}
    sites = {name: Site(name, "linear", *w.shape) for name, w in weights.items()}
    statistics = {name: Statistics(fisher=g.square().sum(dim=0), count=1) for name, g in gradients.items()}
    true = {name: float((weights[name].double() * gradients[name]).square().mean()) for name in weights}
    assert true["wide"] > 2 * true["tall"]
    ranks = CESSL(low_share=0.5, importance="taylor").ranks(sites, statistics, 4, lambda name: weights[name])
    assert ranks == {"tall": 2, "wide": 4}
