"""EDoRA against the card's identities: the dense computation of DoRA's norms, in float64."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.edora import EDoRA
from eckart.adapters.layer import EckartLayer
from eckart.adapters.lora_xs import LoRAXS
from eckart.adapters.site import Site

SITE = Site("layer", "linear", 12, 10)
WEIGHT = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(1))


def start(scale=1.0, weight=WEIGHT, seed=0, **options):
    adapter = EDoRA(**options).build(SITE, 3, scale)
    adapter.initialize(weight, None, torch.Generator().manual_seed(seed))
    return adapter


def moved(scale=1.0, seed=0, **options):
    """An adapter after some training."""
    adapter, generator = start(scale, seed=seed, **options), torch.Generator().manual_seed(3 + seed)
    adapter.core.data += torch.randn(3, 3, generator=generator)
    adapter.magnitude.data *= 1 + torch.rand(12, generator=generator)
    return adapter


def double(tensor):
    return tensor.detach().double().numpy()


def linear(bias=True, weight=WEIGHT):
    torch.manual_seed(0)
    base = nn.Linear(10, 12, bias=bias)
    base.weight.data = weight
    return base


def dense(adapter, weight):
    """diag(m / n) (W + c B R A) with norms of the dense rows."""
    factors = double(adapter.left) @ double(adapter.core) @ double(adapter.right)
    changed = double(weight) + adapter.scale * factors
    return double(adapter.magnitude)[:, None] * changed / np.linalg.norm(changed, axis=1, keepdims=True)


def hidden_bias(base):
    """The layer as a plain function, which shows no bias."""
    return partial(base.forward)


def test_the_start():
    adapter, base = start(sigma=0), linear()
    np.testing.assert_allclose(double(adapter.magnitude), np.linalg.norm(double(WEIGHT), axis=1), rtol=1e-6)
    assert torch.equal(adapter(X, base), base(X))
    change = ((start()(X, base) - base(X)).norm() / base(X).norm()).detach()
    assert 0 < float(change) < 1e-3


def test_the_factors_are_those_of_lora_xs():
    adapter = start()
    twin = LoRAXS().build(SITE, 3, 1.0)
    twin.initialize(WEIGHT, None, torch.Generator().manual_seed(0))
    for name in ("left", "core", "right"):
        assert torch.equal(getattr(adapter, name), getattr(twin, name))


def test_trainable():
    adapter = start()
    assert {name for name, _ in adapter.named_parameters()} == {"core", "magnitude"}
    assert adapter.num_trainable() == EDoRA().trainable(SITE, 3) == 9 + 12
    # RoBERTa-base: query, value and attention output (768 rows) and the MLP's output (768) in each of 12 blocks.
    rows = Site("layer", "linear", 768, 768)
    assert 12 * 4 * EDoRA().trainable(rows, 8) == 48 * 64 + 36_864


@pytest.mark.parametrize("init", ["svd", "random"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_norms_without_a_dense_product(init, scale):
    adapter = moved(scale, init=init)
    changed = double(WEIGHT) + scale * double(adapter.left) @ double(adapter.core) @ double(adapter.right)
    expected = double(adapter.magnitude) / np.linalg.norm(changed, axis=1)
    np.testing.assert_allclose(double(adapter.gain()), expected, rtol=1e-5)


@pytest.mark.parametrize("view", [lambda base: base, hidden_bias])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer(bias, view):
    """Merged and unmerged agree, rows have the trained lengths, and the bias is not scaled."""
    adapter, base = moved(0.5), linear(bias)
    expected = dense(adapter, WEIGHT)
    merged = double(WEIGHT) + double(adapter.delta(WEIGHT))
    np.testing.assert_allclose(merged, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(merged, axis=1), double(adapter.magnitude), rtol=1e-5)
    y = double(X) @ expected.T + (double(base.bias) if bias else 0)
    np.testing.assert_allclose(double(adapter(X, view(base))), y, atol=1e-4)
    np.testing.assert_allclose(double(adapter(X[0, 0], view(base))), y[0, 0], atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_one_on_another(bias):
    """As the layer nests them: what is applied is what would be merged, one after the other."""
    layer = EckartLayer(linear(bias, WEIGHT.clone()), SITE)
    layer.add("first", moved(), inference_mode=False)
    layer.add("second", moved(seed=1, init="random"), inference_mode=False)
    layer.set_adapter(["first", "second"])
    apart = layer(X)
    layer.merge()
    assert not torch.allclose(layer.base_layer(X), linear(bias)(X), atol=0.1)
    assert torch.allclose(layer(X), apart, atol=1e-4)


def test_gradients():
    """The norm is a constant: dL/dR = c Bᵀ diag(g) G Aᵀ with G = dL/dW, dL/dm = rowsum(G ∘ (W + c B R A)) / n."""
    adapter = moved(0.5)
    weights = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))
    (adapter(X, linear()) * weights).sum().backward()
    gradient = np.einsum("bto,bti->oi", double(weights), double(X))
    left, right = double(adapter.left), double(adapter.right)
    changed = double(WEIGHT) + 0.5 * left @ double(adapter.core) @ right
    norms = np.linalg.norm(changed, axis=1)
    gain = double(adapter.magnitude) / norms
    expected = 0.5 * left.T @ (gain[:, None] * gradient) @ right.T
    np.testing.assert_allclose(double(adapter.core.grad), expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(double(adapter.magnitude.grad), (gradient * changed).sum(1) / norms, atol=1e-4)


@pytest.mark.parametrize("init", ["svd", "random"])
def test_rows_of_zeros(init):
    weight = WEIGHT.clone()
    weight[4] = 0
    adapter, base = start(weight=weight, init=init, sigma=0), linear(weight=weight)
    assert torch.equal(adapter(X, base), base(X))
    adapter(X, base).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in adapter.parameters())
    adapter.core.data += 1
    adapter.magnitude.data += 1
    assert bool(adapter(X, base).isfinite().all() and adapter.delta(weight).isfinite().all())


def test_half_precision_base():
    adapter, base = start(sigma=0), linear().to(torch.bfloat16)
    x = X.to(torch.bfloat16)
    assert torch.equal(adapter(x, base), base(x))
    assert torch.equal(adapter(x, hidden_bias(base)), base(x))


def test_linear_only():
    assert "of kind conv2d" in EDoRA().check(Site("layer", "conv2d", 12, 18, (3, 3)), 3)
    assert "must be 1 to 10, not 11" in EDoRA().check(SITE, 11)


def test_options():
    with pytest.raises(ValueError, match="init must be one of svd, random, not 'pca'"):
        EDoRA(init="pca")
