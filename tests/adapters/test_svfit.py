"""SVFit against the card's identities, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.site import Site
from eckart.adapters.svfit import SVFit
from every_kind import every_kind

SITE = Site("layer", "linear", 12, 10)
WEIGHT = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
X = torch.randn(7, 10, generator=torch.Generator().manual_seed(1))
U, S, VH = np.linalg.svd(WEIGHT.double().numpy(), full_matrices=False)
TRAINED = ("value", "shift", "multiplier")


def start(scale=1.0, rank=3, weight=WEIGHT, **options):
    adapter = SVFit(**options).build(Site("layer", "linear", *weight.shape), rank, scale)
    adapter.initialize(weight, None, torch.Generator().manual_seed(0))
    return adapter


def double(tensor):
    return tensor.detach().double().numpy()


def linear(weight=WEIGHT):
    base = nn.Linear(weight.shape[1], weight.shape[0])
    base.weight.data = weight.clone()
    return base


def test_the_singular_values_are_trained_from_their_own_value():
    adapter = start()
    assert [name for name, _ in adapter.named_parameters()] == ["core"]
    np.testing.assert_allclose(double(adapter.core), S[:3], rtol=1e-5)
    np.testing.assert_allclose(double(adapter.left).T @ double(adapter.left), np.eye(3), atol=1e-6)
    np.testing.assert_allclose(double(adapter.right) @ double(adapter.right).T, np.eye(3), atol=1e-6)
    rest = double(WEIGHT) - double(adapter.left) * double(adapter.core) @ double(adapter.right)
    assert np.linalg.norm(rest) == pytest.approx(np.sqrt((S[3:] ** 2).sum()), rel=1e-5)
    np.testing.assert_allclose(rest.T @ double(adapter.left), 0, atol=1e-5)  # W_eᵀ U_r = 0


@pytest.mark.parametrize("trained", TRAINED)
def test_nothing_changes_at_the_start(trained):
    base = linear()
    assert torch.equal(start(trained=trained)(X, base), base(X))


@pytest.mark.parametrize("trained", TRAINED)
def test_every_form_of_the_trained_number_is_the_same_function(trained):
    """The layer has U_r diag(z) V_rᵀ in the place of U_r diag(s_r) V_rᵀ."""
    adapter, z = start(trained=trained), np.array([2.0, -1.0, 9.0])  # neither positive nor in order
    moved = {"value": z, "shift": z - S[:3], "multiplier": z / S[:3] - 1}[trained]
    adapter.core.data = torch.tensor(moved, dtype=torch.float32)
    expected = U[:, :3] * (z - S[:3]) @ VH[:3]
    np.testing.assert_allclose(double(adapter.delta(WEIGHT)), expected, atol=1e-5)
    base = linear()
    changed = double(X) @ (double(WEIGHT) + expected).T + double(base.bias)
    np.testing.assert_allclose(double(adapter(X, base)), changed, atol=1e-4)
    left, right = adapter.low_rank()
    assert (left.shape, right.shape) == ((12, 3), (3, 10))


def test_the_change_is_diagonal_among_the_singular_vectors_and_scaled():
    adapter = start(scale=0.5)
    adapter.core.data += torch.tensor([1.0, -2.0, 3.0])
    np.testing.assert_allclose(U.T @ double(adapter.delta(WEIGHT)) @ VH.T, np.diag([0.5, -1, 1.5] + [0] * 7), atol=1e-5)


@pytest.mark.parametrize("trained", TRAINED)
def test_gradient(trained):
    """g_i = c u_iᵀ G v_i with G = dL/dW, times s_i for the multiplier."""
    adapter = start(scale=0.5, trained=trained)
    weights = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    (adapter(X, linear()) * weights).sum().backward()
    gradient = double(weights).T @ double(X)
    expected = 0.5 * np.einsum("oi,on,in->i", U[:, :3], gradient, VH[:3])
    expected = expected * S[:3] if trained == "multiplier" else expected
    np.testing.assert_allclose(double(adapter.core.grad), expected, atol=1e-4)


def test_trainable():
    assert SVFit().trainable(Site("layer", "linear", 768, 768), 768) == 768
    # "16 times fewer than LoRA" is r = 8 of LoRA against all of a square weight.
    assert 8 * (768 + 768) == 16 * 768
    assert start(rank=10).num_trainable() == 10


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_energy_reached(rank):
    assert float(start(rank=rank).energy) == pytest.approx((S[:rank] ** 2).sum() / (S**2).sum(), rel=1e-6)


def test_energy_chooses_the_rank_of_every_layer():
    weights = {"random": WEIGHT, "thin": WEIGHT[:, :1] @ WEIGHT[:1], "none": torch.zeros(12, 10)}
    sites = dict.fromkeys(weights, SITE)
    chosen = SVFit(energy=0.99).ranks(sites, {}, 3, weights.__getitem__)
    held = np.cumsum(S**2) / (S**2).sum()
    assert chosen == {"random": int(np.argmax(held >= 0.99)) + 1, "thin": 1, "none": 1}
    assert float(start(rank=chosen["random"]).energy) >= 0.99
    assert float(start(rank=chosen["random"] - 1).energy) < 0.99
    assert SVFit().ranks(sites, {}, 3, weights.__getitem__) is None


def test_convolution_and_embedding():
    for adapter in every_kind(SVFit(), 0.5):
        adapter.core.data += 0.5


@pytest.mark.parametrize("weight", [torch.zeros(6, 4), torch.ones(6, 4), torch.full((1, 4), 2.0)])
def test_weights_of_small_rank(weight):
    adapter = start(rank=min(3, *weight.shape), weight=weight)
    assert float(adapter.energy) == pytest.approx(1)
    adapter.core.data += 1
    assert bool(adapter.delta(weight).isfinite().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 0.0}, "energy is a share of the squared norm, above 0 and at most 1, not 0.0"),
        ({"energy": float("nan")}, "energy is a share"),
        ({"trained": "log"}, "trained must be one of value, shift, multiplier, not 'log'"),
        ({"solver": "fast"}, "solver must be one of auto, exact, lanczos, randomized, not 'fast'"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        SVFit(**options)


def test_rank_above_the_width_is_refused():
    assert "must be 1 to 10, not 11" in SVFit().check(SITE, 11)
    assert SVFit(energy=0.99).check(SITE, 11) is None  # 11 is not used
