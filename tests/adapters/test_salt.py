"""SALT against the card's identities, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.salt import SALT, product_norm
from eckart.adapters.site import Site, site_of

SITE = Site("layer", "linear", 12, 10)
WEIGHT = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
X = torch.randn(7, 10, generator=torch.Generator().manual_seed(1))
RELU = ("none", "diagonal", "full")


def start(scale=1.0, rank=3, ratio=0.4, weight=WEIGHT, **options):
    adapter = SALT(ratio=ratio, **options).build(Site("layer", "linear", *weight.shape), rank, scale)
    adapter.initialize(weight, None, torch.Generator().manual_seed(0))
    return adapter


def move(adapter, size=0.5):
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return adapter


def double(tensor):
    return tensor.detach().double().numpy()


def linear(weight=WEIGHT):
    base = nn.Linear(weight.shape[1], weight.shape[0])
    base.weight.data = weight.clone()
    return base


def by_the_paper(adapter):
    """U C Vᵀ from the definition of C."""
    k, s = adapter.k, double(adapter.s)
    core = np.diag(s)
    core[:k, :k] = np.diag((1 + double(adapter.gain)) * s[:k] + double(adapter.shift))
    core[k:, k:] += adapter.scale * double(adapter.left) @ double(adapter.right)
    if adapter.method.relu == "full":
        core = np.maximum(core, 0)
    if adapter.method.relu == "diagonal":
        np.fill_diagonal(core, np.maximum(np.diag(core), 0))
    return double(adapter.u) @ core @ double(adapter.vh)


def test_the_frozen_part_is_the_decomposition():
    adapter = start()
    u, s, vh = (double(part) for part in (adapter.u, adapter.s, adapter.vh))
    np.testing.assert_allclose(u.T @ u, np.eye(10), atol=1e-6)
    np.testing.assert_allclose(vh @ vh.T, np.eye(10), atol=1e-6)
    np.testing.assert_allclose(u * s @ vh, double(WEIGHT), atol=1e-5)


@pytest.mark.parametrize("relu", RELU)
def test_nothing_changes_at_the_start(relu):
    base = linear()
    assert torch.equal(start(relu=relu)(X, base), base(X))


@pytest.mark.parametrize("relu", RELU)
@pytest.mark.parametrize(("ratio", "scale"), [(0.4, 1.0), (0.4, 0.5), (0.0, 1.0), (1.0, 1.0)])
def test_the_layer_has_the_weight_of_the_paper(relu, ratio, scale):
    adapter, base = move(start(scale, ratio=ratio, relu=relu), 2.0), linear()  # so that the ReLU has work to do
    expected = by_the_paper(adapter)
    np.testing.assert_allclose(double(WEIGHT + adapter.delta(WEIGHT)), expected, atol=2e-5)
    np.testing.assert_allclose(double(adapter(X, base)), double(X) @ expected.T + double(base.bias), atol=2e-4)
    clamped = np.linalg.norm(expected - by_the_paper(move(start(scale, ratio=ratio), 2.0)))
    assert (clamped > 0.1) == (relu != "none")


def test_rank_and_factors():
    adapter = move(start())
    left, right = adapter.low_rank()
    assert (left.shape, right.shape) == ((12, 4 + 3), (4 + 3, 10))
    assert np.linalg.matrix_rank(double(adapter.delta(WEIGHT)), tol=1e-4) == 7
    assert start(relu="diagonal").low_rank()[0].shape == (12, 7)  # nothing clamped at the start
    assert start(relu="full").low_rank() is None


def test_the_released_relu_destroys_the_low_rank():
    """The card's measurement: about half of the entries off the diagonal are set to zero."""
    adapter = move(start(relu="full", ratio=0.1, rank=2), 1.0)
    assert np.linalg.matrix_rank(double(adapter.delta(WEIGHT)), tol=1e-3) > 1 + 2


def test_the_released_relu_holds_back_the_gradient():
    """At Y = 0 the gradient is Xᵀ diag(diag G) with G the core's, against Xᵀ G without the ReLU."""
    weights = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    for relu in ("full", "none", "diagonal"):
        adapter = start(relu=relu)
        (adapter(X, linear()) * weights).sum().backward()
        core = double(adapter.u).T @ double(weights).T @ double(X) @ double(adapter.vh).T
        tail = core[4:, 4:]
        expected = double(adapter.left).T @ (np.diag(np.diag(tail)) if relu == "full" else tail)
        np.testing.assert_allclose(double(adapter.right.grad), expected, atol=1e-4)
        np.testing.assert_allclose(double(adapter.gain.grad), double(adapter.s)[:4] * np.diag(core)[:4], atol=1e-4)
        np.testing.assert_allclose(double(adapter.shift.grad), np.diag(core)[:4], atol=1e-4)


def test_what_is_clamped_gets_the_gradient_of_its_definition():
    """Autograd through the definition, in float64."""
    adapter = move(start(relu="diagonal"), 2.0)
    weights = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    (adapter(X, linear()) * weights).sum().backward()
    gain, shift, left, right = (
        getattr(adapter, name).detach().double().requires_grad_() for name in ("gain", "shift", "left", "right")
    )
    s = adapter.s.double()
    core = torch.block_diag(torch.diag((1 + gain) * s[:4] + shift), torch.diag(s[4:]) + left @ right)
    core = core - torch.diag(core.diagonal()) + torch.diag(core.diagonal().relu())
    weight = adapter.u.double() @ core @ adapter.vh.double()
    ((X.double() @ weight.mT) * weights.double()).sum().backward()
    for name, twin in (("gain", gain), ("shift", shift), ("left", left), ("right", right)):
        np.testing.assert_allclose(double(getattr(adapter, name).grad), double(twin.grad), atol=1e-3)


def test_two_steps_move_everything():
    adapter, base = start(), linear()
    before = [parameter.detach().clone() for parameter in adapter.parameters()]
    weights = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        (adapter(X, base) * weights).sum().backward()
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, adapter.parameters(), strict=True))


def test_penalty():
    adapter = move(start(regularization=0.01, scale=0.5))
    change = by_the_paper(adapter) - double(WEIGHT)
    u, vh = double(adapter.u), double(adapter.vh)
    top, tail = u[:, :4].T @ change @ vh[:4].T, u[:, 4:].T @ change @ vh[4:].T
    expected = 0.01 * (np.linalg.norm(top) + np.linalg.norm(tail))
    assert float(adapter.penalty().detach()) == pytest.approx(expected, rel=1e-4)
    assert start().penalty() is None


def test_penalty_at_the_start_has_no_gradient_and_no_nan():
    adapter = start(regularization=1.0)
    penalty = adapter.penalty()
    penalty.backward()
    assert float(penalty.detach()) == 0
    assert all(not parameter.grad.any() for parameter in adapter.parameters())
    adapter.shift.data[0] = 1e-3
    adapter.penalty().backward()
    assert float(adapter.shift.grad[0]) == pytest.approx(1)  # not squared: full force from the first moment


def test_product_norm():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 2, generator=generator), torch.randn(2, 5, generator=generator)
    a, b = x.double().requires_grad_(), y.double().requires_grad_()
    c, d = x.double().requires_grad_(), y.double().requires_grad_()
    torch.linalg.vector_norm(a @ b).backward()
    norm = product_norm(c, d)
    norm.backward()
    assert float(norm.detach()) == pytest.approx(float((x @ y).norm()), rel=1e-5)
    assert torch.allclose(a.grad, c.grad)
    assert torch.allclose(b.grad, d.grad)


def test_trainable():
    """2 k + 2 q (n - k), with the code's settings for SAM 2 and SAM."""
    assert start().num_trainable() == SALT(ratio=0.4).trainable(SITE, 3) == 2 * 4 + 2 * 3 * 6
    assert SALT().trainable(Site("layer", "linear", 2304, 768), 256) == 2 * 76 + 2 * 256 * 692
    assert SALT(ratio=760 / 768).trainable(Site("layer", "linear", 768, 768), 8) == 2 * 760 + 2 * 8 * 8
    assert SALT(ratio=0.01).leading(SITE) == 1
    assert SALT(ratio=0).leading(SITE) == 0
    assert start(ratio=1.0).num_trainable() == 20  # S-SAM


def test_init():
    adapter = start()
    # Kaiming uniform with a = sqrt 20 is uniform in ± sqrt(6 / 21 q).
    assert 0.8 < float(adapter.left.detach().abs().max()) / (6 / 63) ** 0.5 <= 1
    assert not adapter.right.any()
    adapter = start(init="normal", ratio=0.0, rank=10)
    assert 0.009 < float(torch.cat([adapter.left, adapter.right.mT]).detach().std()) < 0.011
    assert 0 < float(adapter.delta(WEIGHT).detach().norm()) < 0.01 * float(WEIGHT.norm())


@pytest.mark.parametrize("relu", RELU)
def test_convolution(relu):
    torch.manual_seed(0)
    module, x = nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.randn(2, 3, 9, 9)
    matrix = module.weight.detach().flatten(1).clone()
    adapter = SALT(ratio=0.3, relu=relu).build(site_of("layer", module), 3, 0.5)
    adapter.initialize(matrix, None, torch.Generator().manual_seed(0))
    move(adapter)
    with torch.no_grad():
        y = adapter(x, module)
        module.weight.copy_((matrix + adapter.delta(matrix)).reshape(module.weight.shape))
        assert torch.allclose(y, module(x), atol=1e-5)


@pytest.mark.parametrize("relu", RELU)
@pytest.mark.parametrize("weight", [torch.zeros(6, 4), torch.ones(6, 4), torch.full((1, 4), 2.0)])
def test_weights_of_small_rank(relu, weight):
    adapter = move(start(rank=1, weight=weight, relu=relu, regularization=1.0))
    np.testing.assert_allclose(double(weight + adapter.delta(weight)), by_the_paper(adapter), atol=1e-5)
    (adapter(torch.ones(2, 4), linear(weight)).sum() + adapter.penalty()).backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in adapter.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relu": "all"}, "relu must be one of none, diagonal, full, not 'all'"),
        ({"init": "kaiming"}, "init must be one of zero, normal, not 'kaiming'"),
        ({"ratio": 1.5}, "ratio is a share of the singular values, from 0 to 1, not 1.5"),
        ({"regularization": -1.0}, "regularization must be a number of at least 0, not -1.0"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        SALT(**options)


def test_check():
    assert SALT(ratio=0.4).check(SITE, 6) is None
    assert SALT(ratio=1.0).check(SITE, 6) is None
    assert "has 6 singular values below the scaled ones; lower the rank 7" in SALT(ratio=0.4).check(SITE, 7)
    assert "must be 1 to 10, not 11" in SALT().check(SITE, 11)
