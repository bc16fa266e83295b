"""NoRA against the card's identities, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.nora import NoRA
from eckart.adapters.site import Site
from eckart.models.calibrate import Statistics

SITE = Site("layer", "linear", 12, 10)
WEIGHT = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
ABSMEAN = torch.logspace(-2, 2, 10, dtype=torch.float64)
X = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))


def start(scale=1.0, rank=4, absmean=ABSMEAN, weight=WEIGHT, **options):
    adapter = NoRA(**options).build(SITE, rank, scale)
    adapter.initialize(weight, Statistics(absmean=absmean), torch.Generator().manual_seed(0))
    return adapter


def moved(scale=1.0, **options):
    adapter, generator = start(scale, **options), torch.Generator().manual_seed(2)
    for factor in (adapter.inner_left, adapter.inner_right):
        factor.data += torch.randn(factor.shape, generator=generator)
    return adapter


def double(tensor):
    return tensor.detach().double().numpy()


def linear(weight=WEIGHT):
    base = nn.Linear(10, 12)
    base.weight.data = weight
    return base


@pytest.mark.parametrize("exponent", [0.5, 1.0, 0.0])
def test_activation_aware_outer_factors(exponent):
    adapter = start(exponent=exponent)
    scaling = ABSMEAN.numpy() ** exponent
    u, s, vh = np.linalg.svd(double(WEIGHT) * scaling, full_matrices=False)
    left, right = double(adapter.left), double(adapter.right)
    np.testing.assert_allclose(left.T @ left, np.diag(s[:4] ** 2), atol=1e-5 * s[0] ** 2)
    np.testing.assert_allclose((right * scaling) @ (right * scaling).T, np.eye(4), atol=1e-4)
    np.testing.assert_allclose(left @ right, (u[:, :4] * s[:4]) @ vh[:4] / scaling, atol=1e-4)
    error = np.linalg.norm((double(WEIGHT) - left @ right) * scaling)
    assert error == pytest.approx(np.sqrt((s[4:] ** 2).sum()), rel=1e-4)


def test_exponent_zero_is_the_plain_svd():
    u, s, vh = np.linalg.svd(double(WEIGHT), full_matrices=False)
    adapter = start(exponent=0.0)
    np.testing.assert_allclose(double(adapter.left) @ double(adapter.right), (u[:, :4] * s[:4]) @ vh[:4], atol=1e-5)


@pytest.mark.parametrize("split", ["left", "right", "even", "none"])
def test_split(split):
    """The product of the outer factors is the same, or without the singular values."""
    adapter = start(split=split)
    scaling = ABSMEAN.numpy() ** 0.5
    u, s, vh = np.linalg.svd(double(WEIGHT) * scaling, full_matrices=False)
    spectrum = np.ones(4) if split == "none" else s[:4]
    left, right = double(adapter.left), double(adapter.right)
    np.testing.assert_allclose(left @ right, (u[:, :4] * spectrum) @ vh[:4] / scaling, atol=1e-4)
    power = {"left": 2, "right": 0, "even": 1, "none": 0}[split]
    np.testing.assert_allclose(left.T @ left, np.diag(s[:4] ** power), atol=1e-5 * s[0] ** 2)


def test_trainable():
    adapter = start(inner_rank=2)
    assert {name for name, _ in adapter.named_parameters()} == {"inner_left", "inner_right"}
    assert adapter.num_trainable() == NoRA(inner_rank=2).trainable(SITE, 4) == 2 * 4 * 2
    assert [NoRA().inner(rank) for rank in (1, 4, 16, 64)] == [1, 1, 4, 16]


def test_the_start():
    base = linear()
    assert torch.equal(start()(X, base), base(X))
    adapter = start(inner_rank=2, init="code")
    # Kaiming uniform with a = sqrt 5 is uniform in ± 1 / sqrt(fan in).
    for factor, fan_in in ((adapter.inner_left, 2), (adapter.inner_right, 4)):
        assert 0.7 < float(factor.abs().max()) * fan_in**0.5 <= 1
    assert float(adapter.delta(WEIGHT).detach().norm()) > 0.1


@pytest.mark.parametrize("init", ["zero", "code"])
def test_delta_is_what_the_layer_does(init):
    adapter, base = moved(0.5, inner_rank=2, init=init), linear()
    core = double(adapter.inner_left) @ double(adapter.inner_right)
    expected = 0.5 * double(adapter.left) @ core @ double(adapter.right)
    size = np.abs(expected).max()
    np.testing.assert_allclose(double(adapter.delta(WEIGHT)), expected, atol=1e-6 * size)
    y = double(X) @ (double(WEIGHT) + expected).T + double(base.bias)
    np.testing.assert_allclose(double(adapter(X, base)), y, atol=1e-5 * size)
    assert np.linalg.matrix_rank(expected, tol=1e-6 * size) == 2
    left, right = adapter.low_rank()
    assert (left.shape, right.shape) == ((12, 2), (2, 10))
    # Its columns lie in the span of U_r.
    u = np.linalg.svd(double(WEIGHT) * ABSMEAN.numpy() ** 0.5)[0][:, :4]
    np.testing.assert_allclose(u @ (u.T @ expected), expected, atol=1e-5 * size)


def test_gradients_arrive_within_two_steps():
    adapter, base = start(inner_rank=2), linear()
    weights = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.01)
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        (adapter(X, base) * weights).sum().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in adapter.named_parameters())


def test_silent_inputs_do_no_harm():
    """A zero in D has no inverse, and needs none: B A = U_r U_rᵀ W."""
    absmean = ABSMEAN.clone()
    absmean[[2, 5]] = 0
    adapter = start(absmean=absmean)
    u = np.linalg.svd(double(WEIGHT) * absmean.numpy() ** 0.5)[0][:, :4]
    expected = u @ (u.T @ double(WEIGHT))
    np.testing.assert_allclose(double(adapter.left) @ double(adapter.right), expected, atol=1e-4)
    silent = start(absmean=torch.zeros(10, dtype=torch.float64))
    assert torch.equal(silent.left, start(exponent=0.0).left)


def test_a_weight_of_small_rank():
    adapter = start(weight=torch.ones(12, 10), init="code")
    assert bool(adapter.delta(WEIGHT).isfinite().all())
    np.testing.assert_allclose(double(adapter.left) @ double(adapter.right), np.ones((12, 10)), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_rank": 0}, "inner_rank must be at least 1, not 0; leave it out for r / 4"),
        ({"exponent": -0.5}, r"exponent must lie in \[0, 2\], not -0.5; ASVD uses 0.5"),
        ({"split": "both"}, "split must be one of right, left, even, none, not 'both'"),
        ({"init": "random"}, "init must be one of zero, code, not 'random'"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        NoRA(**options)


def test_check_and_statistics():
    assert "gets rank 4, below inner_rank 5" in NoRA(inner_rank=5).check(SITE, 4)
    assert NoRA(inner_rank=4).check(SITE, 4) is None
    assert "must be 1 to 10, not 11" in NoRA().check(SITE, 11)
    assert "of kind embedding" in NoRA().check(Site("layer", "embedding", 12, 10), 4)
    assert NoRA.needs == {"absmean"}
    with pytest.raises(ValueError, match="calibration did not gather 'absmean'"):
        NoRA().build(SITE, 4, 1.0).initialize(WEIGHT, Statistics(), torch.Generator())
