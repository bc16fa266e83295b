"""CorDA against an inverse and a full SVD in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.corda import CorDA, context_oriented_svd
from eckart.adapters.site import Site
from eckart.models.calibrate import Statistics

OUT, IN, RANK = 12, 10, 3
SITE = Site("layer", "linear", OUT, IN)
MODES = pytest.mark.parametrize("mode", ["ipm", "kpm"])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(scale: float = 1.0) -> torch.Tensor:
    """Correlated and of very different size, as activations are."""
    return scale * (randn(40, IN, seed=1) @ randn(IN, IN, seed=2)) * torch.logspace(0, -1.5, IN)


def start(gram: torch.Tensor | None = None, weight: torch.Tensor | None = None, scale: float = 1.0, **options):
    x = inputs().double()
    weight = randn(OUT, IN) if weight is None else weight
    adapter = CorDA(**options).build(SITE, RANK, scale)
    statistics = Statistics(count=40, gram=x.mT @ x if gram is None else gram)
    adapter.initialize(weight, statistics, torch.Generator())
    return adapter, weight


def reference(weight: torch.Tensor, power: float = 1.0):
    """U, S and V̂ as the paper writes them, C in units of its mean diagonal."""
    x = inputs().double().numpy()
    context = x.T @ x
    context = context / np.diag(context).mean() + 0.01 * np.eye(IN)
    values, vectors = np.linalg.eigh(context)
    context = (vectors * values**power) @ vectors.T
    u, s, vh = np.linalg.svd(weight.double().numpy() @ context, full_matrices=False)
    return u, s, vh @ np.linalg.inv(context), context


@MODES
@pytest.mark.parametrize("power", [1, 0.5])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_factors_are_the_papers(mode, power, scale):
    adapter, weight = start(mode=mode, power=power, scale=scale)
    u, s, v_hat, context = reference(weight, power)
    part = slice(RANK) if mode == "ipm" else slice(-RANK, None)
    left, right = adapter.left.detach().double().numpy(), adapter.right.detach().double().numpy()
    # float32 factors.
    np.testing.assert_allclose(scale * left @ right, (u[:, part] * s[part]) @ v_hat[part], atol=1e-5)
    np.testing.assert_allclose(left.T @ left, np.diag(s[part] / scale), atol=1e-6 * s[0] / scale)
    # V̂ᵀ C'² V̂ = I.
    gram = right @ context @ context @ right.T
    np.testing.assert_allclose(gram, np.diag(s[part] / scale), rtol=1e-4, atol=1e-5 * s[part][0] / scale)


@MODES
def test_nothing_changes_at_the_start_and_delta_is_what_forward_does(mode):
    adapter, weight = start(mode=mode, scale=0.5)
    base, x = nn.Linear(IN, OUT), randn(5, IN, seed=3)
    base.weight.data = weight
    assert torch.allclose(adapter(x, base), base(x), atol=1e-5)
    adapter.left.data += 0.1
    adapter.right.data -= 0.2
    assert torch.allclose(adapter(x, base), x @ (weight + adapter.delta(weight)).mT + base.bias, atol=1e-5)
    assert adapter.num_trainable() == CorDA().trainable(SITE, RANK) == RANK * (OUT + IN)


@pytest.mark.parametrize(("mode", "first"), [("ipm", 0), ("kpm", IN - RANK)])
def test_white_inputs_give_the_plain_svd(mode, first):
    """PiSSA for "ipm", MiLoRA for "kpm"; C' = 1.01 I moves 0.5 % between B and A."""
    adapter, weight = start(gram=5 * torch.eye(IN, dtype=torch.float64), mode=mode)
    u, s, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    part = slice(first, first + RANK)
    best = (u[:, part] * s[part]) @ vh[part]
    np.testing.assert_allclose((adapter.left @ adapter.right).detach().numpy(), best, atol=1e-5)
    np.testing.assert_allclose(adapter.left.detach().square().sum(0).numpy(), 1.01 * s[part], rtol=1e-5)


@MODES
def test_the_scale_of_the_inputs_does_not_matter(mode):
    one, _ = start(mode=mode)
    for factor in (1e-12, 1e12):
        x = inputs(factor).double()
        other, _ = start(gram=x.mT @ x, mode=mode)
        assert torch.allclose(one.left, other.left, atol=1e-5)
        assert torch.allclose(one.right, other.right, atol=1e-5)


@pytest.mark.parametrize("power", [1, 0.5])
def test_each_power_has_the_least_error_in_its_own_norm(power):
    weight = randn(OUT, IN)
    _, s, _, context = reference(weight, power)
    errors = {}
    for name, options in {"own": {"power": power}, "other": {"power": 1.5 - power}}.items():
        adapter, _ = start(weight=weight, **options)
        left = weight.double() - (adapter.left @ adapter.right).detach().double()
        errors[name] = np.linalg.norm(left.numpy() @ context)
    assert errors["own"] == pytest.approx(np.sqrt((s[RANK:] ** 2).sum()), rel=1e-5)
    assert errors["own"] < errors["other"]


def test_where_the_singular_values_go():
    factors = {fuse: start(sigma_fuse=fuse)[0] for fuse in ("UV", "U", "V")}
    products = [(a.left @ a.right).detach() for a in factors.values()]
    assert torch.allclose(products[0], products[1], atol=1e-5)
    assert torch.allclose(products[0], products[2], atol=1e-5)
    _, s, v_hat, _ = reference(randn(OUT, IN))
    norms = [factors[fuse].left.detach().double().norm(dim=0).numpy() for fuse in ("UV", "U", "V")]
    for norm, expected in zip(norms, (np.sqrt(s[:RANK]), s[:RANK], np.ones(RANK)), strict=True):
        np.testing.assert_allclose(norm, expected, rtol=1e-5)
    np.testing.assert_allclose(np.abs(factors["U"].right.detach().numpy()), np.abs(v_hat[:RANK]), atol=1e-4)


@MODES
def test_weights_and_inputs_without_full_rank(mode):
    x = inputs()[:4].double()  # fewer tokens than columns
    for weight in (torch.zeros(OUT, IN), randn(OUT, 2) @ randn(2, IN, seed=5)):
        adapter, _ = start(gram=x.mT @ x, weight=weight, mode=mode)
        assert all(bool(p.isfinite().all()) for p in adapter.parameters())
        assert float(adapter.left.detach().norm(dim=0).min()) > 0  # a zero pair of columns would never move
        assert float(adapter.delta(weight).detach().abs().max()) < 1e-5


@MODES
def test_a_gradient_reaches_both_factors(mode):
    adapter, weight = start(mode=mode)
    base, x = nn.Linear(IN, OUT), randn(5, IN, seed=3)
    base.weight.data = weight
    (adapter(x, base) * randn(5, OUT, seed=4)).sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in adapter.parameters())


def test_the_whole_svd_is_good_to_float64():
    """κ(C') up to 100 in: the last triplets must not drown in the rounding of the first."""
    weight, x = randn(OUT, IN).double(), (inputs() * torch.logspace(0, -6, IN)).double()
    found = context_oriented_svd(weight, x.mT @ x)
    context = x.mT @ x / (x.mT @ x).diagonal().mean() + 0.01 * torch.eye(IN, dtype=torch.float64)
    expected = np.linalg.svd((weight @ context).numpy(), compute_uv=False)
    np.testing.assert_allclose(found.s.numpy(), expected, rtol=1e-10)


def test_messages():
    with pytest.raises(ValueError, match="mode must be one of ipm, kpm, not 'both'"):
        CorDA(mode="both")
    with pytest.raises(ValueError, match="sigma_fuse must be one of UV, U, V, not 'S'"):
        CorDA(sigma_fuse="S")
    with pytest.raises(ValueError, match=r"power must be 1 .* not 2"):
        CorDA(power=2)
    for damping in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping must be a positive number"):
            CorDA(damping=damping)
    with pytest.raises(ValueError, match="no input but zeros"):
        start(gram=torch.zeros(IN, IN, dtype=torch.float64))
    with pytest.raises(ValueError, match="did not gather 'gram'"):
        CorDA().build(SITE, RANK, 1.0).initialize(randn(OUT, IN), Statistics(count=1), torch.Generator())
    assert "kind conv2d" in CorDA().check(Site("layer", "conv2d", OUT, IN), RANK)
