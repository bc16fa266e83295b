"""LoRA-XS against the card's identities, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.lora_xs import LoRAXS
from eckart.adapters.site import Site
from every_kind import every_kind

SITE = Site("layer", "linear", 12, 10)
WEIGHT = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))


def start(scale=1.0, rank=3, weight=WEIGHT, **options):
    site = Site("layer", "linear", *weight.shape)
    adapter = LoRAXS(**options).build(site, rank, scale)
    adapter.initialize(weight, None, torch.Generator().manual_seed(0))
    return adapter


def double(tensor):
    return tensor.detach().double().numpy()


def linear(weight=WEIGHT):
    base = nn.Linear(weight.shape[1], weight.shape[0])
    base.weight.data = weight
    return base


def test_the_outer_factors_are_the_principal_part():
    adapter = start()
    u, s, vh = np.linalg.svd(double(WEIGHT), full_matrices=False)
    left, right = double(adapter.left), double(adapter.right)
    np.testing.assert_allclose(left.T @ left, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(right @ right.T, np.diag(s[:3] ** 2), atol=1e-5 * s[0] ** 2)
    np.testing.assert_allclose(left @ right, (u[:, :3] * s[:3]) @ vh[:3], atol=1e-5)


@pytest.mark.parametrize(("split", "power"), [("right", (0, 2)), ("left", (2, 0)), ("even", (1, 1)), ("none", (0, 0))])
def test_split(split, power):
    adapter = start(split=split)
    s = np.linalg.svd(double(WEIGHT), compute_uv=False)[:3]
    left, right = double(adapter.left), double(adapter.right)
    np.testing.assert_allclose(left.T @ left, np.diag(s ** power[0]), atol=1e-5 * s[0] ** 2)
    np.testing.assert_allclose(right @ right.T, np.diag(s ** power[1]), atol=1e-5 * s[0] ** 2)


def test_only_the_core_is_trained():
    adapter = start()
    assert [name for name, _ in adapter.named_parameters()] == ["core"]
    assert LoRAXS().trainable(Site("layer", "linear", 4096, 14336), 64) == 64 * 64
    # RoBERTa-large, four matrices in each of 24 blocks, r = 16; Mistral-7B, seven in each of 32, r = 64.
    assert 24 * 4 * LoRAXS().trainable(SITE, 16) == 24_576
    assert 32 * 7 * LoRAXS().trainable(SITE, 64) == 917_504


def test_the_start():
    core = double(start(rank=10, sigma=0.5).core)
    assert 0.4 < core.std() < 0.6  # 100 draws: the deviation of the deviation is 7 %
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    base = linear()
    assert torch.equal(start(sigma=0)(x, base), base(x))
    change = ((start()(x, base) - base(x)).norm() / base(x).norm()).detach()
    assert 0 < float(change) < 1e-4


@pytest.mark.parametrize("init", ["svd", "random"])
def test_delta_is_what_the_layer_does(init):
    adapter = start(scale=0.5, init=init)
    adapter.core.data += torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
    expected = 0.5 * double(adapter.left) @ double(adapter.core) @ double(adapter.right)
    np.testing.assert_allclose(double(adapter.delta(WEIGHT)), expected, atol=1e-5)
    x, base = torch.randn(5, 10, generator=torch.Generator().manual_seed(1)), linear()
    changed = double(x) @ (double(WEIGHT) + expected).T + double(base.bias)
    np.testing.assert_allclose(double(adapter(x, base)), changed, atol=1e-4)


def test_delta_stays_in_the_principal_spaces():
    adapter = start()
    adapter.core.data += torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
    delta = double(adapter.delta(WEIGHT))
    u, _, vh = np.linalg.svd(double(WEIGHT), full_matrices=False)
    np.testing.assert_allclose(u[:, :3] @ (u[:, :3].T @ delta), delta, atol=1e-5)
    np.testing.assert_allclose((delta @ vh[:3].T) @ vh[:3], delta, atol=1e-5)
    assert np.linalg.matrix_rank(delta, tol=1e-4) == 3


def test_gradient_of_the_core():
    """dL/dR = c Bᵀ G Aᵀ with G = dL/dW, also at R = 0."""
    adapter = start(scale=0.5, sigma=0)
    x = torch.randn(7, 10, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    (adapter(x, linear()) * weights).sum().backward()
    gradient = double(weights).T @ double(x)
    expected = 0.5 * double(adapter.left).T @ gradient @ double(adapter.right).T
    np.testing.assert_allclose(double(adapter.core.grad), expected, atol=1e-4)


def test_random_factors():
    adapter = start(init="random")
    # Kaiming uniform with a = sqrt 5 is uniform in ± 1 / sqrt(fan in).
    for factor, fan_in in ((adapter.left, 3), (adapter.right, 10)):
        assert 0.7 < float(factor.abs().max()) * fan_in**0.5 <= 1
    again = start(init="random")
    assert torch.equal(adapter.left, again.left)
    assert torch.equal(adapter.core, again.core)


def test_convolution_and_embedding():
    for _ in every_kind(LoRAXS(sigma=1.0), 0.5, atol=1e-4):
        pass  # it starts away from zero


@pytest.mark.parametrize("weight", [torch.zeros(6, 4), torch.ones(6, 4), torch.full((1, 4), 2.0)])
def test_weights_of_small_rank(weight):
    adapter = start(rank=min(3, *weight.shape), weight=weight, sigma=1.0)
    assert bool(adapter.delta(weight).isfinite().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "pca"}, "init must be one of svd, random, not 'pca'"),
        ({"split": "both"}, "split must be one of right, left, even, none, not 'both'"),
        ({"solver": "fast"}, "solver must be one of auto, exact, lanczos, randomized, not 'fast'"),
        ({"sigma": -1.0}, "sigma must be a number of at least 0, not -1.0; the paper uses 1e-5"),
        ({"sigma": float("nan")}, "sigma must be a number"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        LoRAXS(**options)


def test_rank_above_the_width_is_refused():
    assert "must be 1 to 10, not 11" in LoRAXS().check(SITE, 11)
