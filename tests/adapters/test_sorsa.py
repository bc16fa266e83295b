"""SORSA against the card's identities, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.site import Site
from eckart.adapters.sorsa import SORSA, smooth_root, squared_deviation
from every_kind import every_kind

SITE = Site("layer", "linear", 12, 10)
WEIGHT = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))


def start(rank: int = 3, scale: float = 1.0, **options):
    adapter = SORSA(**options).build(SITE, rank, scale)
    adapter.initialize(WEIGHT, None, torch.Generator().manual_seed(0))
    return adapter


def move(adapter: nn.Module, size: float = 0.1, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


def wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25])
def test_the_start_is_the_principal_part_with_s_apart(scale):
    adapter = start(scale=scale)
    u, s, vh = np.linalg.svd(wide(WEIGHT), full_matrices=False)
    b, d, a = wide(adapter.left), wide(adapter.core), wide(adapter.right)
    np.testing.assert_allclose((b * d) @ a, (u[:, :3] * s[:3]) @ vh[:3], atol=1e-5)
    np.testing.assert_allclose(d, s[:3], rtol=1e-6)  # not divided by c
    np.testing.assert_allclose(b.T @ b, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(a @ a.T, np.eye(3), atol=1e-6)
    assert np.linalg.norm(wide(WEIGHT) - (b * d) @ a) == pytest.approx(np.sqrt((s[3:] ** 2).sum()), rel=1e-5)
    # Nothing but the rounding of two equal products that are subtracted.
    assert float(adapter.delta(WEIGHT).detach().abs().max()) < 1e-5


def test_delta_is_the_formula_and_what_forward_does():
    adapter = start(scale=0.5)
    b0, d0, a0 = wide(adapter.left), wide(adapter.core), wide(adapter.right)
    move(adapter)
    b, d, a = wide(adapter.left), wide(adapter.core), wide(adapter.right)
    expected = 0.5 * ((b * d) @ a - (b0 * d0) @ a0)
    np.testing.assert_allclose(wide(adapter.delta(WEIGHT)), expected, atol=1e-5)
    base = nn.Linear(10, 12)
    base.weight.data = WEIGHT
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(2))
    expected = wide(x) @ (wide(WEIGHT) + expected).T + wide(base.bias)
    np.testing.assert_allclose(wide(adapter(x, base)), expected, atol=1e-4)
    left, right = adapter.low_rank()
    assert (left.shape, right.shape) == ((12, 6), (6, 10))


def test_trained_are_u_s_and_v():
    adapter = start()
    assert {name for name, _ in adapter.named_parameters()} == {"left", "core", "right"}
    assert adapter.num_trainable() == SORSA().trainable(SITE, 3) == 3 * (12 + 10 + 1)


def test_the_gradient_of_s_is_the_diagonal_of_the_projected_one():
    adapter = start(scale=0.5)
    b, a = wide(adapter.left), wide(adapter.right)
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(2))
    g = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    (adapter.update(x) * g).sum().backward()
    expected = np.diag(b.T @ (wide(g).T @ wide(x)) @ a.T) * 0.5
    np.testing.assert_allclose(wide(adapter.core.grad), expected, atol=1e-5)


@pytest.mark.parametrize("form", ["sorsa", "squared"])
def test_the_penalty_is_the_mean_over_both_factors(form):
    adapter = start(form=form, weight=0.7)
    move(adapter)
    b, a = wide(adapter.left), wide(adapter.right)
    norms = np.array([np.linalg.norm(b.T @ b - np.eye(3)), np.linalg.norm(a @ a.T - np.eye(3))])
    assert norms.min() > 0.1
    expected = 0.7 * (norms.mean() if form == "sorsa" else (norms**2).mean())
    # The smooth root is at most 1e-3 below the norm.
    assert adapter.penalty().item() == pytest.approx(expected, rel=1e-5, abs=1e-3 if form == "sorsa" else 0)
    adapter.penalty().backward()
    inner = 4 * b @ (b.T @ b - np.eye(3))  # of the squared norm
    expected = 0.7 / 2 * (inner / (2 * norms[0]) if form == "sorsa" else inner)
    np.testing.assert_allclose(wide(adapter.left.grad), expected, rtol=1e-3, atol=1e-5)
    assert adapter.core.grad is None


def test_rounding_at_the_start_pushes_nothing():
    """The plain norm has a gradient of length 2 wherever the deviation is not exactly zero."""
    torch.manual_seed(0)
    factor = torch.linalg.qr(torch.randn(500, 16))[0].requires_grad_()
    (plain,) = torch.autograd.grad(squared_deviation(factor).sqrt(), factor)
    (smooth,) = torch.autograd.grad(smooth_root(squared_deviation(factor)), factor)
    assert 0 < float(squared_deviation(factor).sqrt().detach()) < 1e-5
    assert float(plain.norm()) == pytest.approx(2, rel=0.01)
    assert float(smooth.norm()) < 0.02
    exact = torch.eye(5, 3, requires_grad=True)
    smooth_root(squared_deviation(exact)).backward()
    assert torch.equal(exact.grad, torch.zeros(5, 3))


def test_autocast_does_not_reach_the_penalty():
    adapter = start()
    move(adapter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = adapter.penalty()
    assert torch.equal(inside, adapter.penalty())


def test_the_penalty_keeps_the_factors_orthonormal_in_training():
    target = WEIGHT + 0.2 * torch.randn(12, 10, generator=torch.Generator().manual_seed(5))
    deviations = {}
    for form in ("sorsa", "squared", "none"):
        adapter = start(form=form, weight=10.0)
        optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-3)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (WEIGHT + adapter.delta(WEIGHT) - target).square().sum()
            penalty = adapter.penalty()
            (loss if penalty is None else loss + penalty).backward()
            optimizer.step()
        deviations[form] = max(float(squared_deviation(f.detach()).sqrt()) for f in (adapter.left, adapter.right))
    # A force of constant size leaves a deviation of the order of step size times weight, here 0.01.
    assert deviations["sorsa"] < 0.02 < 0.05 < deviations["none"]
    assert deviations["squared"] < deviations["none"]


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
    for adapter in every_kind(SORSA(), 1.0):
        move(adapter)


def test_options():
    assert start(form="none").penalty() is None
    assert start(weight=0).penalty() is None
    # The default is the paper's gamma / eta, shared by the 7 linear maps of 32 blocks.
    assert SORSA().weight == pytest.approx(4e-4 / 3e-5 / (7 * 32), rel=0.01)
    with pytest.raises(ValueError, match="form must be one of sorsa, squared, none, not 'norm'"):
        SORSA(form="norm")
    with pytest.raises(ValueError, match="solver must be one of auto, exact, lanczos, randomized, not 'fast'"):
        SORSA(solver="fast")
    with pytest.raises(ValueError, match=r"weight must not be negative, not -1\.0; 0 is the same as form='none'"):
        SORSA(weight=-1.0)
