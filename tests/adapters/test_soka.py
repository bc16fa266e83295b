"""SoKA against numpy's Kronecker products, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.site import Site
from eckart.adapters.soka import SoKA, kronecker_terms

OUT, IN, RANK = 12, 10, 3
SITE = Site("layer", "linear", OUT, IN)
SHAPE = (6, 2)  # 12 + 10 numbers a term, the fewest; (12, 1) and (1, 10) have as many but are low rank


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def start(weight: torch.Tensor | None = None, rank: int = RANK, scale: float = 1.0, site: Site = SITE, **options):
    weight = randn(site.out_features, site.in_features) if weight is None else weight
    adapter = SoKA(**options).build(site, rank, scale)
    adapter.initialize(weight, None, torch.Generator())
    return adapter, weight


def kronecker_sum(left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    pairs = zip(left.detach().double().numpy(), right.detach().double().numpy(), strict=True)
    return sum(np.kron(a, b) for a, b in pairs)


def block_spectrum(weight: torch.Tensor, shape: tuple[int, int]) -> np.ndarray:
    """Singular values of the matrix whose rows are the blocks, block by block."""
    (m1, n1), (m, n) = shape, weight.shape
    blocks = [
        weight[i * m // m1 : (i + 1) * m // m1, j * n // n1 : (j + 1) * n // n1].flatten()
        for i in range(m1)
        for j in range(n1)
    ]
    return np.linalg.svd(torch.stack(blocks).double().numpy(), compute_uv=False)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_start_is_the_nearest_sum_of_kronecker_products(scale):
    adapter, weight = start(scale=scale)
    assert (adapter.left.shape, adapter.right.shape) == ((RANK, *SHAPE), (RANK, 2, 5))
    s = block_spectrum(weight, SHAPE)
    error = weight.double().numpy() - scale * kronecker_sum(adapter.left, adapter.right)
    assert np.linalg.norm(error) == pytest.approx(np.sqrt((s[RANK:] ** 2).sum()), rel=1e-5)
    for factor in (adapter.left, adapter.right):
        rows = factor.detach().double().flatten(1).numpy()
        np.testing.assert_allclose(rows @ rows.T, np.diag(s[:RANK] / scale), atol=5e-6 * s[0] / scale)


def test_all_terms_reproduce_the_weight():
    adapter, weight = start(rank=10)
    np.testing.assert_allclose(kronecker_sum(adapter.left, adapter.right), weight.double().numpy(), atol=1e-5)


@pytest.mark.parametrize("init", ["weight", "zero"])
def test_nothing_changes_at_the_start_and_delta_is_what_forward_does(init):
    adapter, weight = start(scale=0.5, init=init)
    base, x = nn.Linear(IN, OUT), randn(2, 5, IN, seed=3)
    base.weight.data = weight
    assert torch.allclose(adapter(x, base), base(x), atol=1e-5)
    a0, b0 = adapter.left.detach().clone(), adapter.right.detach().clone()
    adapter.left.data += 0.1
    adapter.right.data -= 0.2
    delta = adapter.delta(weight).detach()
    expected = 0.5 * (kronecker_sum(adapter.left, adapter.right) - kronecker_sum(a0, b0))
    np.testing.assert_allclose(delta.double().numpy(), expected, atol=1e-5)
    assert torch.allclose(adapter(x, base), x @ (weight + delta).mT + base.bias, atol=1e-5)
    assert adapter.num_trainable() == SoKA().trainable(SITE, RANK) == RANK * (12 + 10)
    assert adapter.low_rank() is None


def test_one_term_has_more_rank_than_one():
    site = Site("layer", "linear", 16, 16)
    adapter, weight = start(rank=1, site=site)
    assert adapter.left.shape == adapter.right.shape == (1, 4, 4)  # 32 numbers, as many as one rank of LoRA
    assert SoKA().trainable(site, 1) == 16 + 16
    adapter.left.data += randn(1, 4, 4, seed=4)
    adapter.right.data += randn(1, 4, 4, seed=5)
    assert np.linalg.matrix_rank(adapter.delta(weight).detach().double().numpy(), tol=1e-5) == 16


@pytest.mark.parametrize("init", ["weight", "zero"])
def test_a_gradient_reaches_all_factors_in_two_steps(init):
    adapter, weight = start(init=init)
    base, x, target = nn.Linear(IN, OUT), randn(5, IN, seed=3), randn(5, OUT, seed=4)
    base.weight.data = weight
    before = [p.detach().clone() for p in adapter.parameters()]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        (adapter(x, base) * target).sum().backward()
        optimizer.step()
    for old, new in zip(before, adapter.parameters(), strict=True):
        assert bool((new.detach() != old).flatten(1).any(1).all())


def test_the_gradient_is_that_of_the_dense_weight():
    adapter, weight = start()
    adapter.left.data += 0.1
    x, target = randn(5, IN, seed=3), randn(5, OUT, seed=4)
    (adapter.update(x) * target).sum().backward()
    found = [p.grad.clone() for p in adapter.parameters()]
    adapter.zero_grad()
    (x @ adapter.delta(weight).mT * target).sum().backward()
    for one, other in zip(found, (p.grad for p in adapter.parameters()), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_it_learns_a_sum_of_kronecker_products_that_low_rank_cannot():
    """The update is a sum of 3 terms, of rank 10: the best of rank 3, as many numbers, misses most of it."""
    update = 0.3 * kronecker_sum(randn(RANK, 6, 2, seed=5), randn(RANK, 2, 5, seed=6))
    adapter, weight = start(init="zero")
    goal = torch.from_numpy(update).float()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.03)
    for _ in range(600):
        optimizer.zero_grad()
        (adapter.delta(weight) - goal).square().sum().backward()
        optimizer.step()
    s = np.linalg.svd(update, compute_uv=False)
    best_of_rank_3 = np.sqrt((s[RANK:] ** 2).sum())
    assert float((adapter.delta(weight).detach() - goal).norm()) < 0.2 * best_of_rank_3


def test_terms_are_the_smaller_of_energy_and_elbow():
    s = torch.tensor([9.0, 8.0, 1.0, 0.5, 0.25])
    total = float(s.square().sum())
    assert kronecker_terms(s, 0.0, 0.5) == 1  # 81 of 146
    assert kronecker_terms(s, 0.0, 1.0) == 2  # the elbow
    assert kronecker_terms(s, total**0.5, 0.45) == 2  # 81 + 64 of 292 is needed where half lies outside
    assert kronecker_terms(torch.ones(4), 10.0, 0.9) == 4  # flat: no elbow, and the energy is out of reach
    assert kronecker_terms(torch.zeros(4), 0.0, 0.9) == 1
    assert kronecker_terms(torch.ones(1), 0.0, 0.9) == 1


def test_ranks_follow_the_weight():
    site = Site("flat", "linear", 16, 16)
    pairs = [(randn(4, 4, seed=seed), randn(4, 4, seed=seed + 10)) for seed in range(2)]
    two = sum(torch.kron(a / a.norm(), b / b.norm()) for a, b in pairs)
    weights = {"flat": randn(16, 16), "two": two + 1e-3 * randn(16, 16)}
    sites = {"flat": site, "two": Site("two", "linear", 16, 16)}
    assert SoKA(energy=0.999).ranks(sites, {}, 6, weights.__getitem__)["two"] == 2
    found = SoKA(energy=0.5).ranks(sites, {}, 6, weights.__getitem__)
    assert all(1 <= found[name] <= 6 for name in sites)
    assert SoKA(dynamic=False).ranks(sites, {}, 6, weights.__getitem__) is None


def test_layers_that_do_not_split_are_refused():
    assert "7 x 11, so its Kronecker products are ordinary low-rank" in SoKA().check(Site("l", "linear", 7, 11), 2)
    assert "low-rank terms" in SoKA().check(Site("l", "linear", 1, 5), 1)
    assert "must be 1 to 10, not 11" in SoKA().check(SITE, 11)
    # 5 x 4: U (5, 2) and V (1, 2) make terms of rank 2, at most 2 of them.
    assert "is a sum of 2 Kronecker products, so its rank must be 1 to 2" in SoKA().check(Site("l", "linear", 5, 4), 3)
    assert "kind conv2d" in SoKA().check(Site("l", "conv2d", OUT, IN), 2)
    assert SoKA().check(SITE, 10) is None


def test_a_zero_weight_and_messages():
    adapter, _ = start(torch.zeros(OUT, IN))
    assert all(bool(p.isfinite().all()) for p in adapter.parameters())
    for energy in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="energy is a share of the squared norm"):
            SoKA(energy=energy)
    with pytest.raises(ValueError, match="init must be one of weight, zero, not 'random'"):
        SoKA(init="random")


def test_few_tokens_and_many_get_the_same_update():
    """One token passes through the terms, many are multiplied by their sum."""
    site = Site("layer", "linear", 24, 36)
    adapter = SoKA().build(site, 5, 1.0)
    adapter.initialize(torch.randn(24, 36, generator=torch.Generator().manual_seed(0)), None, torch.Generator())
    for parameter in adapter.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    x = torch.randn(40, 36, generator=torch.Generator().manual_seed(2))
    many = adapter.update(x)
    few = torch.cat([adapter.update(row[None]) for row in x])
    assert torch.allclose(many, few, rtol=1e-4, atol=1e-5)
    assert torch.allclose(many, x @ adapter.delta(torch.empty(0)).mT, rtol=1e-4, atol=1e-5)
