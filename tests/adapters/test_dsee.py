"""DSEE against the card's identities, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.dsee import DSEE, sparse_support
from eckart.adapters.site import Site

SITE = Site("layer", "linear", 12, 10)
WEIGHT = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
X = torch.randn(4, 7, 10, generator=torch.Generator().manual_seed(1))
G = torch.randn(4, 7, 12, generator=torch.Generator().manual_seed(2))


def start(scale=1.0, weight=WEIGHT, **options):
    adapter = DSEE(**({"nonzeros": 6} | options)).build(SITE, 3, scale)
    adapter.initialize(weight, None, torch.Generator().manual_seed(0))
    return adapter


def move(adapter, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapter


def double(tensor):
    return tensor.detach().double().numpy()


def linear():
    base = nn.Linear(10, 12).requires_grad_(False)
    base.weight.data = WEIGHT.clone()
    return base


def learnt(adapter):
    """c (B A + S)."""
    sparse = np.zeros(120)
    sparse[adapter.places.numpy()] = double(adapter.values)
    return adapter.scale * (double(adapter.left) @ double(adapter.right) + sparse.reshape(12, 10))


def three(**options):
    """Layers whose weights and updates are of different size, and what prunes them."""
    method = DSEE(nonzeros=6, **options)
    adapters = {}
    for index in range(3):
        adapter = method.build(SITE, 3, 0.5)
        generator = torch.Generator().manual_seed(index)
        adapter.initialize((3 - index) * torch.randn(12, 10, generator=generator), None, generator)
        for parameter in move(adapter, index).parameters():
            parameter.data *= 1 + index
        adapters[f"layers.{index}"] = adapter
    return adapters, method.coordinate(adapters, seed=0)


def test_the_start():
    adapter, base = start(), linear()
    assert torch.equal(adapter(X, base), base(X))
    assert adapter.num_trainable() == DSEE(nonzeros=6).trainable(SITE, 3) == 3 * 22 + 6
    assert len(set(adapter.places.tolist())) == 6
    assert torch.equal(adapter.dropped, WEIGHT)
    assert not adapter.left.any()
    assert not adapter.values.any()
    wide = DSEE().build(Site("layer", "linear", 20, 400), 10, 1.0)
    wide.initialize(torch.ones(20, 400), None, torch.Generator().manual_seed(0))
    assert float(wide.right.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_the_paper_counts_its_parameters_so():
    """BERT base: query and value of twelve layers, r = N = 16."""
    assert 24 * DSEE().trainable(Site("layer", "linear", 768, 768), 16) == 590_208


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("pruned", [True, False])
def test_the_layer_has_the_weight_of_the_paper(scale, pruned):
    adapter, base = move(start(scale)), linear()
    mask = np.ones((12, 10))
    if pruned:
        kept = torch.rand(12, 10, generator=torch.Generator().manual_seed(5)) > 0.4
        adapter.drop(kept)
        mask = double(kept)
    expected = double(WEIGHT) * mask + learnt(adapter)
    np.testing.assert_allclose(double(WEIGHT + adapter.delta(WEIGHT)), expected, atol=1e-6)
    np.testing.assert_allclose(double(adapter(X, base)), double(X) @ expected.T + double(base.bias), atol=1e-5)
    np.testing.assert_allclose(double(adapter(X[0, 0], base)), double(adapter(X, base))[0, 0], atol=1e-5)


def test_gradient_is_that_of_the_full_weight_at_the_support():
    adapter, base = start(0.5), linear()
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    full = double(G).reshape(-1, 12).T @ double(X).reshape(-1, 10)
    for step in range(2):
        optimizer.zero_grad()
        (adapter(X, base) * G).sum().backward()
        np.testing.assert_allclose(
            double(adapter.values.grad), 0.5 * full.reshape(-1)[adapter.places.numpy()], atol=1e-4
        )
        np.testing.assert_allclose(double(adapter.left.grad), 0.5 * full @ double(adapter.right).T, atol=1e-3)
        assert adapter.right.grad.any() == (step > 0)
        optimizer.step()
    assert [name for name, p in adapter.named_parameters() if torch.equal(p, before[name])] == []
    alone = learnt(adapter) - 0.5 * double(adapter.left) @ double(adapter.right)
    assert (np.abs(alone) > 1e-9).sum() == 6


def test_the_support_is_what_low_rank_does_not_explain():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 5, generator=generator) @ torch.randn(5, 50, generator=generator)
    weight += 0.05 * torch.randn(60, 50, generator=generator)
    spikes = torch.randperm(3000, generator=generator)[:30].sort().values
    weight.view(-1)[spikes] += 4.0
    found = {name: sparse_support(weight, 30, 5, name, generator).tolist() for name in ("decomposition", "magnitude")}
    assert found["decomposition"] == spikes.tolist()
    assert len(set(found["magnitude"]) & set(spikes.tolist())) < 15
    largest = np.argsort(-np.abs(double(weight)).reshape(-1))[:30]
    assert found["magnitude"] == sorted(largest.tolist())
    draws = [
        sparse_support(weight, 30, 5, "random", torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert [len(set(draw)) for draw in draws] == [30] * 3
    # Nothing left over, or nothing there: still N places.
    for empty in (torch.zeros(12, 10), torch.ones(12, 10)):
        assert len(set(start(weight=empty).places.tolist())) == 6


@pytest.mark.parametrize("importance", ["update", "weight", "both"])
def test_the_smallest_of_all_layers_are_dropped(importance):
    adapters, coordinator = three(prune=0.3, importance=importance)
    weights = {name: double(adapter.dropped) for name, adapter in adapters.items()}
    sizes = []
    for name, adapter in adapters.items():
        change = learnt(adapter)
        sizes.append(np.abs({"update": change, "weight": weights[name], "both": weights[name] + change}[importance]))
    threshold = np.sort(np.concatenate([size.reshape(-1) for size in sizes]))[108]  # 0.3 of 360 are below
    coordinator.on_step(1, 1)
    shares = []
    for size, (name, adapter) in zip(sizes, adapters.items(), strict=True):
        mask = size >= threshold
        # Kept entries are those of the base to the bit.
        assert np.array_equal(double(adapter.dropped), weights[name] * ~mask)
        expected = weights[name] * mask + learnt(adapter)
        np.testing.assert_allclose(weights[name] + double(adapter.delta(WEIGHT)), expected, atol=1e-5)
        shares.append(1 - mask.mean())
    assert np.mean(shares) == pytest.approx(0.3)  # of all together, not of each
    assert max(shares) > min(shares) + 0.1


def test_it_happens_once_and_on_time():
    adapters, coordinator = three(at=0.5)
    assert coordinator.counts_steps
    seen = []
    for step in range(1, 11):
        coordinator.on_step(step, 10)
        seen.append([adapter.is_pruned() for adapter in adapters.values()])
        if step == 5:
            dropped = [adapter.dropped.clone() for adapter in adapters.values()]
        for adapter in adapters.values():
            move(adapter, step)
    assert seen == [[step >= 5] * 3 for step in range(1, 11)]
    assert all(torch.equal(a.dropped, before) for a, before in zip(adapters.values(), dropped, strict=True))
    # A file brings the mask along, and with it that it is there.
    again, resumed = three(at=0.5)
    for name, adapter in again.items():
        adapter.load_state_dict(adapters[name].state_dict())
    resumed.on_step(9, 10)
    for name, adapter in again.items():
        assert torch.equal(adapter.delta(WEIGHT), adapters[name].delta(WEIGHT))


def test_without_pruning_there_is_no_copy_and_nothing_to_count():
    adapters, coordinator = three(prune=0)
    assert coordinator is None
    assert {name for name, _ in adapters["layers.0"].named_buffers()} == {"places"}


def test_options():
    with pytest.raises(ValueError, match="nonzeros must be at least 1, not 0"):
        DSEE(nonzeros=0)
    with pytest.raises(ValueError, match="support must be one of decomposition, magnitude, random, not 'omp'"):
        DSEE(support="omp")
    with pytest.raises(ValueError, match="importance must be one of update, weight, both, not 'ABS'"):
        DSEE(importance="ABS")
    with pytest.raises(ValueError, match="prune must be a share of at least 0 and below 1, not 1"):
        DSEE(prune=1)
    with pytest.raises(ValueError, match="at must be a share of the training, 0 to 1, not 5"):
        DSEE(at=5)
    assert "has 120 entries, fewer than nonzeros = 121" in DSEE(nonzeros=121).check(SITE, 3)
    assert DSEE(nonzeros=120).check(SITE, 3) is None
    assert "rank must be 1 to 10, not 11" in DSEE().check(SITE, 11)


def test_autocast():
    adapter = move(start())
    base = linear()
    adapter.drop(WEIGHT > 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = adapter(X, base)
    assert inside.dtype == torch.bfloat16
    outside = adapter(X, base)
    assert float((inside - outside).detach().norm() / outside.detach().norm()) < 0.02  # a few roundings to 8 bits
