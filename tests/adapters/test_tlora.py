"""TLoRA against sums written index by index, in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.site import Site
from eckart.adapters.tlora import TLoRA, modes, ring_change, squared_ring

OUT, IN = 10, 12
SITE = Site("layer", "linear", OUT, IN)
WEIGHT = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
X = torch.randn(5, IN, generator=torch.Generator().manual_seed(2))
G = torch.randn(5, OUT, generator=torch.Generator().manual_seed(3))


def start(rank=2, scale=1.0, site=SITE, **options):
    adapter = TLoRA(**options).build(site, rank, scale)
    adapter.initialize(torch.ones(site.out_features, site.in_features), None, torch.Generator().manual_seed(0))
    return adapter


def move(adapter, size=0.3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


def wide(tensor):
    return tensor.detach().double().numpy()


def linear(bias=True, dtype=torch.float32, weight=WEIGHT):
    torch.manual_seed(0)
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=bias).requires_grad_(False)
    base.weight.data = weight.clone()
    return base.to(dtype)


def digits(index, sizes):
    """i_1, ..., i_D of a flat index, the first the fastest."""
    found = []
    for size in sizes:
        found.append(index % size)
        index //= size
    return found


def transform(adapter):
    """T on the padded size, entry by entry."""
    cores = [wide(core) for core in adapter._cores("transform")]
    sizes = [len(core) for core in cores]
    n = math.prod(sizes)
    dense = np.zeros((n, n))
    for i, j in itertools.product(range(n), range(n)):
        parts = [core[a, b] for core, a, b in zip(cores, digits(i, sizes), digits(j, sizes), strict=True)]
        dense[i, j] = np.trace(np.linalg.multi_dot(parts))
    return dense


def residual(adapter):
    """Δ, entry by entry."""
    outer, inner = ([wide(core) for core in adapter._cores(kind)] for kind in ("output", "input"))
    dense = np.zeros((adapter.site.out_features, adapter.site.in_features))
    for i, j in np.ndindex(*dense.shape):
        parts = [core[a] for core, a in zip(outer, digits(i, map(len, outer)), strict=True)]
        parts += [core[b] for core, b in zip(inner, digits(j, map(len, inner)), strict=True)]
        dense[i, j] = np.trace(np.linalg.multi_dot(parts))
    return dense


def change(adapter):
    """c (W (T - I) + Δ)."""
    width = adapter.site.in_features
    turn = transform(adapter)[:width, :width] - np.eye(width)
    return adapter.scale * (wide(WEIGHT)[:, :width] @ turn + residual(adapter))


def test_modes_are_balanced_and_cover_the_size():
    assert modes(4096, 3) == (16, 16, 16)
    assert modes(1024, 3) == (16, 8, 8)
    for order in (2, 3, 4):
        for size in range(1, 700):
            found = modes(size, order)
            assert len(found) == order
            assert max(found) <= 2 * min(found)
            assert math.prod(found) >= size
            assert size <= math.prod(found) < (1.8 if size < 200 else 1.15) * size


def test_the_identity_of_the_paper():
    """Slices of I / R in every core give T = I exactly (Prop. 1)."""
    for ring in (1, 2, 3):
        adapter = start(transform_rank=ring, noise=0.0)
        for core in adapter._cores("transform"):
            for p, q in np.ndindex(ring, ring):
                np.testing.assert_allclose(wide(core[:, :, p, q]), np.eye(len(core)) / ring, rtol=1e-6)
        np.testing.assert_allclose(transform(adapter), np.eye(12), atol=1e-6)


@pytest.mark.parametrize("ring", [1, 2, 4])
@pytest.mark.parametrize("noise", [0.1, 0.9])
def test_the_start(ring, noise):
    adapter, base = start(transform_rank=ring, noise=noise), linear()
    np.testing.assert_allclose(transform(adapter), np.eye(12), atol=1e-6)
    assert not residual(adapter).any()
    assert torch.equal(adapter(X, base), base(X))
    half = linear(dtype=torch.bfloat16)
    assert torch.equal(adapter(X.bfloat16(), half), half(X.bfloat16()))
    assert not adapter.delta(WEIGHT).any()
    entries = wide(adapter.pattern)
    assert (np.abs(entries[:-1] * ring - 1) <= noise + 1e-6).all()
    assert (len(np.unique(entries[0])) == ring**2) or ring == 1
    for name, parameter in adapter.named_parameters():
        if name.startswith(("output", "input")) and name != "output_0":
            many = start(rank=40, site=Site("layer", "linear", 64, 64))
            drawn = dict(many.named_parameters())[name].detach()
            assert float(drawn.std()) == pytest.approx(1 / (len(drawn) * math.sqrt(40)), rel=0.05)
            assert parameter.any()


@pytest.mark.parametrize("width", [12, 11])  # 11 is filled up to 12
@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_layer_and_delta_are_the_sums_over_the_indices(width, order, scale):
    site = Site("layer", "linear", OUT, width)
    adapter = start(3, scale, site, order=order)
    move(adapter)
    expected = change(adapter)
    np.testing.assert_allclose(wide(adapter.delta(WEIGHT[:, :width])), expected, rtol=1e-4, atol=1e-4)
    base = linear(weight=WEIGHT[:, :width])
    x = X[:, :width]
    whole = wide(x) @ (wide(WEIGHT[:, :width]) + expected).T + wide(base.bias)
    np.testing.assert_allclose(wide(adapter(x, base)), whole, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(wide(adapter(x[0], base)), whole[0], rtol=1e-4, atol=1e-3)
    assert adapter(x[:0], base).shape == (0, OUT)


def test_both_ways_to_apply_the_transform_agree(monkeypatch):
    adapter = start(transform_rank=3)
    move(adapter)
    x = X.repeat(10, 1)
    expected = wide(x) @ (transform(adapter) - np.eye(IN)).T
    formed = []

    def spy(x, *rest):
        formed.append(x.shape[0])
        return ring_change(x, *rest)

    monkeypatch.setattr("eckart.adapters.tlora.ring_change", spy)
    for cost, rows in ((0, len(x)), (10**6, IN)):
        monkeypatch.setattr(adapter, "_cost", lambda cost=cost: cost)
        np.testing.assert_allclose(wide(adapter._turned(x)), expected, rtol=1e-4, atol=1e-4)
        assert formed.pop() == rows
    monkeypatch.undo()
    # 3 x 2 x 2: 3 R² for the first core, 2 (R² + R³) for the second, 2 (1 + R²) for the last.
    assert adapter._cost() == 3 * 9 + 2 * (9 + 27) + 2 * 10
    assert start(site=Site("layer", "linear", 8, 4096))._cost() < 4096 / 12


def test_a_random_transform_has_full_rank():
    adapter = start(site=Site("layer", "linear", OUT, 24), transform_rank=1)
    move(adapter, size=1.0)
    assert np.linalg.matrix_rank(transform(adapter)) == 24


def test_the_residual_has_the_square_of_the_rank():
    adapter = start(2)
    move(adapter)
    assert np.linalg.matrix_rank(residual(adapter), tol=1e-6) == 4


def test_the_square_of_a_ring_is_a_ring():
    adapter = start()
    move(adapter)
    dense = transform(adapter)
    cores = adapter._cores("transform")
    squares = start(transform_rank=4, noise=0.0)
    squares.fill(**{f"transform_{d}": squared_ring(core) for d, core in enumerate(cores)})
    np.testing.assert_allclose(transform(squares), dense @ dense.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("regularizer", ["identity", "orthogonality"])
def test_the_regularizer(regularizer):
    adapter = start(regularizer=regularizer, weight=0.5)
    assert float(adapter.penalty().detach()) == 0
    adapter.penalty().backward()
    assert all(core.grad.isfinite().all() and not core.grad.any() for core in adapter._cores("transform"))
    move(adapter)
    expected = 0.0
    for core, pattern in zip(adapter._cores("transform"), wide(adapter.pattern), strict=True):
        moved, n = wide(core), len(core)
        if regularizer == "orthogonality":
            moved = np.array([[sum(np.kron(a, b) for a, b in zip(i, j, strict=True)) for j in moved] for i in moved])
            pattern = np.kron(pattern, pattern)
        for p, q in np.ndindex(*pattern.shape):
            expected += 0.5 * np.linalg.norm(moved[:, :, p, q] - pattern[p, q] * np.eye(n))
    assert float(adapter.penalty().detach()) == pytest.approx(expected, rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(adapter.penalty().detach()) == pytest.approx(expected, rel=1e-5)
    assert start(regularizer=regularizer).penalty() is None


def fit(noise, steps=120):
    """How far slices of T's cores are apart after training towards an orthogonal matrix, and the loss left."""
    site = Site("layer", "linear", 24, 24)
    adapter = start(site=site, transform_rank=3, noise=noise).double()  # rounding parts the slices too, late
    skew = 0.15 * torch.randn(24, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    eye = torch.eye(24, dtype=torch.float64)
    target = torch.linalg.matrix_exp(skew - skew.mT) - eye
    cores = adapter._cores("transform")
    optimizer = torch.optim.Adam(cores, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (ring_change(eye, cores, adapter.pattern).mT - target).square().sum() / target.square().sum()
        loss.backward()
        optimizer.step()
    spread = max(float((core - core[:, :, :1, :1]).detach().abs().max()) for core in cores)
    return spread, float(loss.detach())


def test_the_noise_is_what_lets_the_slices_differ():
    same, stuck = fit(0.0)
    spread, loss = fit(0.1)
    assert same < 1e-3 < 0.3 < spread
    assert loss < 0.9 * stuck


def test_a_small_change_is_not_lost_in_half_precision():
    """Of a change of 1e-4 of x, T x rounded to bfloat16 has nothing left."""
    torch.manual_seed(0)
    weight = torch.randn(64, 48) / 7
    site = Site("layer", "linear", 64, 48)
    for dtype, accuracy in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        for bias in (False, True):
            base = linear(bias, dtype, weight.to(dtype).float())
            if bias:
                base.bias.data.fill_(3.0)
            adapter = start(site=site)
            for core in adapter._cores("transform"):
                core.data += 1e-5 * torch.randn(core.shape, generator=torch.Generator().manual_seed(1))
            x = torch.randn(32, 48).to(dtype)
            exact = wide(x) @ wide(adapter.delta(base.weight.float())).T
            assert np.abs(exact).max() < 1e-3
            found = wide(adapter.forward(x, _Silent(base, x)))
            assert np.linalg.norm(found - exact) < accuracy * np.linalg.norm(exact)
            rounded = (x.float() + adapter._turned(x)).to(dtype)
            assert (rounded == x).float().mean() > 0.9


class _Silent:
    """A layer that answers 0 to x itself, so that what is added to it is seen unrounded."""

    def __init__(self, base, x):
        self.base, self.x, self.bias = base, x, base.bias

    def __call__(self, z):
        y = self.base(z)
        return torch.zeros_like(y, dtype=torch.float32) if z is self.x else y


def test_autocast_does_not_reach_the_rings():
    adapter = start()
    move(adapter)
    plain = adapter._turned(X), *adapter._residual()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = adapter._turned(X), *adapter._residual()
        y = adapter(X, linear())
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    np.testing.assert_allclose(wide(y), wide(adapter(X, linear())), rtol=0.1, atol=0.3)


def test_gradients_are_those_of_the_dense_weight():
    """Also through the checkpoint and the lift; W and x keep theirs."""
    adapter, base = start(scale=0.5), linear()
    move(adapter)
    x = X.clone().requires_grad_()
    (adapter(x, base) * G).sum().backward()
    found = [p.grad.clone() for p in adapter.parameters()]
    adapter.zero_grad()
    dense = X.clone().requires_grad_()
    ((dense @ (WEIGHT + adapter.delta(WEIGHT)).mT) * G).sum().backward()
    assert torch.allclose(x.grad, dense.grad, rtol=1e-3, atol=1e-4)
    for (name, p), gradient in zip(adapter.named_parameters(), found, strict=True):
        assert torch.allclose(gradient, p.grad, rtol=1e-3, atol=1e-3), name


def test_gradients_reach_everything_within_two_steps():
    adapter, base = start(), linear()
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (adapter(X, base) * G).sum().backward()
        optimizer.step()
    assert [name for name, p in adapter.named_parameters() if torch.equal(p, before[name])] == []


def test_the_count():
    # 12 = 3 x 2 x 2 and 10 -> 12.
    adapter = start(3, transform_rank=2)
    assert adapter.modes == (3, 2, 2)
    assert adapter.num_trainable() == TLoRA().trainable(SITE, 3) == 4 * (9 + 4 + 4) + 9 * (7 + 7)
    big = Site("layer", "linear", 4096, 4096)
    assert TLoRA().trainable(big, 4) == 3 * 16**2 * 4 + 3 * (16 + 16) * 16  # D I^(2/D) R², D (I^(1/D) + J^(1/D)) R²
    assert TLoRA().trainable(big, 4) < 4096 + 4096  # less than LoRA of rank 1
    assert TLoRA().check(SITE, 10) is None
    assert "its rank must be 1 to 10, not 11" in TLoRA().check(SITE, 11)
    assert "of kind conv2d" in TLoRA().check(Site("conv", "conv2d", 8, 27, (3, 3)), 2)


def test_options():
    for options, message in (
        ({"transform_rank": 0}, "transform_rank must be at least 1, not 0"),
        ({"order": 1}, "order must be at least 2, not 1"),
        ({"noise": 1.0}, r"noise must be a share of at least 0 and below 1, not 1\.0"),
        ({"regularizer": "both"}, "regularizer must be one of identity, orthogonality, not 'both'"),
        ({"weight": -1.0}, r"weight must be a number of at least 0, not -1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            TLoRA(**options)
