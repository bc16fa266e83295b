"""SoMA against the card's identities, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.site import Site
from eckart.adapters.soma import SoMA, weight_decay
from every_kind import every_kind

SITE = Site("layer", "linear", 12, 10)
WEIGHT = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))


def start(weight: torch.Tensor = WEIGHT, rank: int = 3, scale: float = 1.0, **options):
    adapter = SoMA(**options).build(Site("layer", "linear", *weight.shape), rank, scale)
    adapter.initialize(weight, None, torch.Generator().manual_seed(0))
    return adapter


def wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("shape", [(12, 10), (10, 12), (10, 10), (80, 70)])
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25])
def test_the_start_is_the_minor_part(shape, scale):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    adapter = start(weight, scale=scale)
    u, s, vh = np.linalg.svd(wide(weight), full_matrices=False)
    b, a = wide(adapter.left), wide(adapter.right)
    minor = scale * b @ a
    np.testing.assert_allclose(minor, (u[:, -3:] * s[-3:]) @ vh[-3:], atol=2e-6 * s[0])
    np.testing.assert_allclose(b.T @ b, np.diag(s[-3:] / scale), atol=1e-6 * s[0] / scale)
    np.testing.assert_allclose(a @ a.T, np.diag(s[-3:] / scale), atol=1e-6 * s[0] / scale)
    assert np.linalg.norm(minor) == pytest.approx(np.sqrt((s[-3:] ** 2).sum()), rel=1e-4)
    # What stays is orthogonal to what is trained.
    rest = wide(weight) - minor
    np.testing.assert_allclose(rest.T @ b, 0, atol=1e-5 * s[0] / scale)
    np.testing.assert_allclose(rest @ a.T, 0, atol=1e-5 * s[0] / scale)


def test_nothing_changes_at_the_start():
    adapter = start()
    base = nn.Linear(10, 12)
    base.weight.data = WEIGHT
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(adapter(x, base), base(x), atol=1e-6)


def test_delta_is_the_formula_and_what_forward_does():
    adapter = start(scale=0.5)
    b0, a0 = wide(adapter.left), wide(adapter.right)
    adapter.left.data += 0.1
    adapter.right.data -= 0.2
    expected = 0.5 * (wide(adapter.left) @ wide(adapter.right) - b0 @ a0)
    np.testing.assert_allclose(wide(adapter.delta(WEIGHT)), expected, atol=1e-6)
    base = nn.Linear(10, 12)
    base.weight.data = WEIGHT
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    expected = wide(x) @ (wide(WEIGHT) + expected).T + wide(base.bias)
    np.testing.assert_allclose(wide(adapter(x, base)), expected, atol=1e-5)
    left, right = adapter.low_rank()
    assert (left.shape, right.shape) == ((12, 6), (6, 10))


def test_trained_are_b_and_a():
    adapter = start()
    assert {name for name, _ in adapter.named_parameters()} == {"left", "right"}
    assert adapter.num_trainable() == SoMA().trainable(SITE, 3) == 3 * (12 + 10)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_deficient_weight_is_trained_from_the_floor(rank):
    """With s = 0 both B and A would be zero, and so would their gradients for ever."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, rank, generator=generator) @ torch.randn(rank, 10, generator=generator)
    adapter = start(weight)
    largest = float(torch.linalg.matrix_norm(weight, 2)) if rank else 1.0
    gram = wide(adapter.left).T @ wide(adapter.left)
    np.testing.assert_allclose(gram, 1e-6 * largest * np.eye(3), rtol=1e-4, atol=1e-12)
    assert float(adapter.delta(weight).detach().abs().max()) < 1e-11
    adapter.update(torch.randn(5, 10, generator=generator)).sum().backward()
    assert all(float(p.grad.abs().max()) > 1e-5 for p in adapter.parameters())
    zero = start(weight, floor=0.0)
    assert float(zero.left.detach().abs().max()) < 1e-3 * math.sqrt(largest)


def test_gradients_reach_everything_within_two_steps():
    adapter = start()
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(2))
    g = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (adapter.update(x) * g).sum().backward()
        optimizer.step()
    assert [name for name, p in adapter.named_parameters() if torch.equal(p, before[name])] == []


def test_convolution_and_embedding():
    for adapter in every_kind(SoMA(), 1.0):
        adapter.left.data += 0.1


def test_weight_decay_is_pytorchs_cosine():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=1e-5)
    for step in range(41):
        assert weight_decay(step, 40) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()
    assert weight_decay(20, 40, start=2.0, end=1.0) == pytest.approx(1.5)


def test_options():
    for floor in (-1.0, 2.0, float("nan")):
        with pytest.raises(ValueError, match="floor must be from 0 to 1, a part of the largest singular value, not"):
            SoMA(floor=floor)
