"""PETALface against the card's identities, in float64."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eckart.adapters.petalface import PETALface, sharpness
from eckart.adapters.site import Site, site_of

SITE = Site("layer", "linear", 12, 10)
WEIGHT = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
X = torch.randn(4, 7, 10, generator=torch.Generator().manual_seed(1))
G = torch.randn(4, 7, 12, generator=torch.Generator().manual_seed(2))
QUALITY = torch.tensor([0.1, 0.5, 0.8, 1.0])


def start(scale=1.0, site=SITE, weight=WEIGHT, **options):
    """An adapter and what rates its samples."""
    method = PETALface(**options)
    adapter = method.build(site, 3, scale)
    adapter.initialize(weight, None, torch.Generator().manual_seed(0))
    return adapter, method.coordinate({site.name: adapter}, seed=0)


def move(adapter, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def rate(coordinator, quality):
    coordinator.before_forward({"quality": torch.as_tensor(quality)}, training=False)


def double(tensor):
    return tensor.detach().double().numpy()


def linear():
    base = nn.Linear(10, 12).requires_grad_(False)
    base.weight.data = WEIGHT.clone()
    return base


def branches(adapter):
    """c U_1 D_1 and c U_2 D_2."""
    left, right, r = double(adapter.left), double(adapter.right), adapter.rank
    return [adapter.scale * left[:, part] @ right[part] for part in (slice(0, r), slice(r, 2 * r))]


def test_the_start():
    (adapter, coordinator), base = start(), linear()
    for quality in (torch.zeros(4), QUALITY, torch.ones(4)):
        rate(coordinator, quality)
        assert torch.equal(adapter(X, base), base(X))
    assert adapter.num_trainable() == PETALface().trainable(SITE, 3) == 2 * 3 * 22
    assert not coordinator.counts_steps
    assert coordinator.penalty() is None
    wide = PETALface().build(Site("layer", "linear", 20, 4000), 8, 1.0)
    wide.initialize(torch.ones(20, 4000), None, torch.Generator().manual_seed(0))
    assert float(wide.right.detach().std()) == pytest.approx(1 / 8, rel=0.02)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_the_layer_is_the_blend_of_both_branches(scale, threshold):
    (adapter, coordinator), base = start(scale, threshold=threshold), linear()
    move(adapter)
    rate(coordinator, QUALITY)
    alpha = np.clip(0.5 + double(QUALITY) - threshold, 0, 1)[:, None, None]
    low, high = branches(adapter)
    x, w, b = double(X), double(WEIGHT), double(base.bias)
    expected = x @ w.T + b + ((1 - alpha) * x) @ low.T + (alpha * x) @ high.T
    found = double(adapter(X, base))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # The same from two weights.
    poor, good = (double(weight) for weight in adapter.blended_weights(WEIGHT))
    np.testing.assert_allclose(poor, w + low, atol=1e-6)
    np.testing.assert_allclose(good, w + high, atol=1e-6)
    np.testing.assert_allclose(found, (1 - alpha) * (x @ poor.T) + alpha * (x @ good.T) + b, atol=1e-5)
    # One sample at a time.
    for sample in range(4):
        rate(coordinator, QUALITY[sample : sample + 1])
        np.testing.assert_allclose(double(adapter(X[sample : sample + 1], base))[0], found[sample], atol=1e-5)


def test_the_ends_use_one_branch_and_the_blend_is_clamped():
    (adapter, coordinator), base = start(), linear()
    move(adapter)
    for quality, change in ((0.0, 0), (-80.0, 0), (1.0, 1), (95.0, 1)):
        rate(coordinator, [quality] * 4)
        expected = double(base(X)) + double(X) @ branches(adapter)[change].T
        np.testing.assert_allclose(double(adapter(X, base)), expected, atol=1e-5)
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0)
        optimizer.zero_grad()
        (adapter(X, base) * G).sum().backward()
        mine, other = (slice(3 * i, 3 * i + 3) for i in (change, 1 - change))
        assert adapter.left.grad[:, mine].any()
        assert adapter.right.grad[mine].any()
        assert not adapter.left.grad[:, other].any()
        assert not adapter.right.grad[other].any()


def test_without_a_score_each_branch_counts_half():
    (adapter, coordinator), base = start(), linear()
    move(adapter)
    expected = double(base(X)) + double(X) @ sum(branches(adapter)).T / 2
    np.testing.assert_allclose(double(adapter(X, base)), expected, atol=1e-5)
    rate(coordinator, QUALITY)
    coordinator.before_forward({"input_ids": X}, training=True)  # the last scores are forgotten
    np.testing.assert_allclose(double(adapter(X, base)), expected, atol=1e-5)
    rate(coordinator, [0.5] * 4)
    np.testing.assert_allclose(double(adapter(X, base)), expected, atol=1e-5)


def test_windows_of_a_sample_share_its_blend():
    (adapter, coordinator), base = start(), linear()
    move(adapter)
    rate(coordinator, QUALITY)
    windows = torch.randn(4, 6, 5, 10, generator=torch.Generator().manual_seed(4))
    whole = adapter(windows, base)
    assert torch.allclose(adapter(windows.flatten(0, 1), base), whole.flatten(0, 1), atol=1e-6)
    assert torch.allclose(adapter(windows.flatten(0, 2), base), whole.flatten(0, 2), atol=1e-6)
    with pytest.raises(ValueError, match="layer: its input has 6 rows, which 4 samples cannot share"):
        adapter(windows[0], base)


def test_convolutions():
    base = nn.Conv2d(3, 8, 3, stride=2, padding=1).requires_grad_(False)
    site = site_of("conv", base)
    weight = base.weight.reshape(8, 27)
    adapter, coordinator = start(0.5, site, weight)
    move(adapter)
    rate(coordinator, QUALITY)
    x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(4))
    outputs = [
        F.conv2d(x.double(), w.double().view(8, 3, 3, 3), base.bias.double(), 2, 1)
        for w in adapter.blended_weights(weight)
    ]
    alpha = QUALITY.double()[:, None, None, None]
    expected = (1 - alpha) * outputs[0] + alpha * outputs[1]
    np.testing.assert_allclose(double(adapter(x, base)), double(expected), atol=1e-5)


def test_a_gradient_reaches_everything_and_not_the_score():
    (adapter, coordinator), base = start(), linear()
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    quality = QUALITY.clone().requires_grad_(True)
    for step in range(2):
        rate(coordinator, quality)
        optimizer.zero_grad()
        (adapter(X, base) * G).sum().backward()
        assert adapter.right.grad.any() == (step > 0)
        optimizer.step()
    assert [name for name, p in adapter.named_parameters() if torch.equal(p, before[name])] == []
    assert quality.grad is None


def score(images, reference):
    """Of the equation."""
    gray = images.mean(1)
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    windows = np.lib.stride_tricks.sliding_window_view(gray, (3, 3), axis=(1, 2))
    v = (windows * kernel).sum((-1, -2)).var((1, 2)) / gray.var((1, 2))
    return v / (v + reference)


def test_sharpness():
    noise = torch.randn(3, 3, 24, 20, generator=torch.Generator().manual_seed(0))
    images = torch.cat([noise, F.avg_pool2d(noise, 5, 1, 2), F.avg_pool2d(noise, 9, 1, 4)])
    found = sharpness(images, 0.1)
    np.testing.assert_allclose(double(found), score(double(images), 0.1), rtol=1e-5)
    assert bool((found[:3] > found[3:6]).all())
    assert bool((found[3:6] > found[6:]).all())
    assert torch.allclose(sharpness(images, float(found[4] * 0.1 / (1 - found[4])))[4], torch.tensor(0.5))
    # Brightness and contrast do not matter, nor a scale that overflows when squared.
    for other in (3 * images + 5, 1e30 * images, 1e-30 * images, -images):
        assert torch.allclose(sharpness(other, 0.1), found, atol=1e-4)
    flat = torch.stack([torch.zeros(3, 8, 8), torch.full((3, 8, 8), 0.1), torch.full((3, 8, 8), 255.0)])
    assert sharpness(flat, 0.1).tolist() == [0, 0, 0]
    assert sharpness(images.to(torch.bfloat16), 0.1).dtype == torch.float32


def test_who_says_how_good_an_image_is():
    _, coordinator = start(reference=0.3, threshold=0.4)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    kwargs = {"pixel_values": images, "labels": None}
    coordinator.before_forward(kwargs, training=True)
    expected = np.clip(0.1 + score(double(images), 0.3), 0, 1)
    np.testing.assert_allclose(double(coordinator.alpha), expected, atol=1e-5)
    assert not coordinator.alpha.requires_grad
    assert set(kwargs) == {"pixel_values", "labels"}
    kwargs["quality"] = QUALITY  # what is given comes first, and the model does not see it
    coordinator.before_forward(kwargs, training=True)
    assert torch.allclose(coordinator.alpha, (QUALITY + 0.1).clamp(max=1))
    assert set(kwargs) == {"pixel_values", "labels"}


def test_one_score_serves_all_layers():
    method = PETALface()
    adapters = {}
    for index in range(3):
        adapter = method.build(Site(f"layers.{index}", "linear", 12, 10), 3, 1.0)
        adapter.initialize(WEIGHT, None, torch.Generator().manual_seed(index))
        move(adapter)
        adapters[f"layers.{index}"] = adapter
    coordinator = method.coordinate(adapters, seed=0)
    rate(coordinator, [1.0] * 4)
    for adapter in adapters.values():
        np.testing.assert_allclose(double(adapter.update(X)), double(X) @ branches(adapter)[1].T, atol=1e-5)


def test_autocast():
    (adapter, coordinator), base = start(), linear()
    move(adapter)
    rate(coordinator, QUALITY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = adapter(X, base)
    assert inside.dtype == torch.bfloat16
    outside = adapter(X, base)
    assert float((inside - outside).detach().norm() / outside.detach().norm()) < 0.02  # a few roundings to 8 bits


def test_it_has_no_one_weight():
    assert not PETALface.mergeable
    adapter, coordinator = start()
    assert adapter.low_rank() is None
    with pytest.raises(ValueError, match="layer: its weight depends on the quality"):
        adapter.delta(WEIGHT)
    with pytest.raises(ValueError, match=r"quality must be a tensor \(batch,\), one score a sample, not \(4, 1\)"):
        rate(coordinator, QUALITY[:, None])
    for shape in ((4, 3, 8), (4, 3, 2, 8), (1, 4, 3, 8, 8)):
        with pytest.raises(ValueError, match="call the model with quality="):
            coordinator.before_forward({"pixel_values": torch.zeros(shape)}, training=False)


def test_options():
    with pytest.raises(ValueError, match="threshold must be a score, 0 to 1, not 30"):
        PETALface(threshold=30)
    with pytest.raises(ValueError, match="reference must be a number above 0, not 0"):
        PETALface(reference=0)
    assert PETALface().check(SITE, 10) is None
    assert "rank must be 1 to 10, not 11" in PETALface().check(SITE, 11)
    assert "of kind embedding" in PETALface().check(Site("tokens", "embedding", 12, 30), 3)


def test_without_quality_and_pixels_it_warns_once():
    _, coordinator = start()
    with pytest.warns(UserWarning, match="neither quality= nor pixel_values="):
        coordinator.before_forward({}, training=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coordinator.before_forward({}, training=False)
    assert coordinator.alpha is None
