"""KaSA against the card's identities, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.kasa import KaSA
from eckart.adapters.site import Site, site_of


def start(shape: tuple[int, int] = (12, 10), rank: int = 3, scale: float = 1.0, seed: int = 0, **options):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    adapter = KaSA(**options).build(Site("layer", "linear", *shape), rank, scale)
    adapter.initialize(weight, None, torch.Generator().manual_seed(seed))
    return adapter, weight


def move(adapter: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def without_minor(weight: torch.Tensor, count: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(wide(weight), full_matrices=False)
    kept = len(s) - count
    return (u[:, :kept] * s[:kept]) @ vh[:kept]


@pytest.mark.parametrize("shape", [(12, 10), (10, 12), (10, 10), (80, 70)])
def test_the_start_is_the_truncated_weight(shape):
    adapter, weight = start(shape)
    base = nn.Linear(shape[1], shape[0])
    base.weight.data = weight
    world = without_minor(weight, 3)
    np.testing.assert_allclose(wide(weight) + wide(adapter.delta(weight)), world, atol=1e-5)
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(2))
    np.testing.assert_allclose(wide(adapter(x, base)), wide(x) @ world.T + wide(base.bias), atol=5e-5)
    s = np.linalg.svd(wide(weight), compute_uv=False)
    shift = float(adapter.delta(weight).detach().double().norm())
    assert shift == pytest.approx(np.sqrt((s[-3:] ** 2).sum()), rel=1e-4)
    assert np.linalg.matrix_rank(wide(weight) + wide(adapter.delta(weight)), tol=1e-5) == min(shape) - 3


def test_the_factors_at_the_start():
    adapter, _ = start((12, 500), rank=8)
    assert torch.equal(adapter.left, torch.zeros(12, 8))
    # Kaiming uniform with a = √5 is uniform between ±1/√in.
    bound = 1 / math.sqrt(500)
    assert float(adapter.right.detach().abs().max()) <= bound
    assert float(adapter.right.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    many = torch.cat([start(seed=seed)[0].core.detach() for seed in range(200)])
    assert float(many.mean()) == pytest.approx(0, abs=0.15)
    assert float(many.std()) == pytest.approx(1, abs=0.1)
    assert torch.equal(start(start="ones")[0].core, torch.ones(3))


def test_delta_is_the_formula_and_what_forward_does():
    adapter, weight = start(scale=0.5)
    move(adapter)
    b, d, a = wide(adapter.left), wide(adapter.core), wide(adapter.right)
    changed = without_minor(weight, 3) + 0.5 * (b * d) @ a
    np.testing.assert_allclose(wide(weight) + wide(adapter.delta(weight)), changed, atol=1e-5)
    base = nn.Linear(10, 12)
    base.weight.data = weight
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(2))
    np.testing.assert_allclose(wide(adapter(x, base)), wide(x) @ changed.T + wide(base.bias), atol=5e-5)
    left, right = adapter.low_rank()
    assert (left.shape, right.shape) == ((12, 6), (6, 10))
    np.testing.assert_allclose(wide(left) @ wide(right), wide(adapter.delta(weight)), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dropped"),
    # The released code keeps in - r components: right for tall and square weights, too many for wide ones.
    [((12, 10), 3), ((10, 10), 3), ((10, 11), 2), ((10, 13), 0), ((10, 30), 0)],
)
def test_the_released_truncation(shape, dropped):
    adapter, weight = start(shape, truncation="released")
    expected = wide(weight) if dropped == 0 else without_minor(weight, dropped)
    np.testing.assert_allclose(wide(weight) + wide(adapter.delta(weight)), expected, atol=1e-5)
    assert adapter.low_rank()[0].shape == (shape[0], 3 + dropped)


def test_without_truncation_it_starts_as_it_was():
    adapter, weight = start(truncation="none")
    assert torch.equal(adapter.delta(weight), torch.zeros(12, 10))
    assert KaSA(truncation="none").check(Site("layer", "linear", 12, 10), 10) is None


def test_trained_are_b_d_and_a():
    for truncation in ("paper", "none"):
        adapter, _ = start(truncation=truncation)
        assert {name for name, _ in adapter.named_parameters()} == {"left", "core", "right"}
        assert adapter.num_trainable() == KaSA().trainable(adapter.site, 3) == 3 * (12 + 10) + 3


@pytest.mark.parametrize("gram", ["small", "large"])
def test_the_penalty(gram):
    adapter, _ = start(beta=0.3, gamma=0.7, gram=gram)
    move(adapter)
    b, d, a = wide(adapter.left), wide(adapter.core), wide(adapter.right)
    if gram == "small":
        deviations = b.T @ b - np.eye(3), a @ a.T - np.eye(3)
        directions = 2 * b @ deviations[0], 2 * deviations[1] @ a
    else:
        deviations = b @ b.T - np.eye(12), a.T @ a - np.eye(10)
        directions = 2 * deviations[0] @ b, 2 * a @ deviations[1]
    norms = [np.linalg.norm(deviation) for deviation in deviations]
    expected = 0.3 * (d**2).sum() + 0.7 * sum(norms)
    # Each smooth root is at most 1e-3 below its norm.
    assert adapter.penalty().item() == pytest.approx(expected, abs=0.7 * 2e-3)
    adapter.penalty().backward()
    np.testing.assert_allclose(wide(adapter.core.grad), 0.6 * d, rtol=1e-5)
    for factor, direction, norm in zip((adapter.left, adapter.right), directions, norms, strict=True):
        np.testing.assert_allclose(wide(factor.grad), 0.7 * direction / norm, rtol=1e-3, atol=1e-5)


def test_the_penalty_has_no_gradient_at_b_zero():
    """A saddle that only the task leaves, as the card says; and no NaN."""
    adapter, _ = start(gamma=1.0)
    adapter.penalty().backward()
    assert torch.equal(adapter.left.grad, torch.zeros(12, 3))
    assert bool(adapter.right.grad.isfinite().all())


def test_autocast_does_not_reach_the_penalty():
    adapter, _ = start()
    move(adapter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = adapter.penalty()
    assert torch.equal(inside, adapter.penalty())


def test_gradients_reach_everything_within_two_steps():
    adapter, _ = start()
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(2))
    g = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (adapter.update(x) * g).sum().backward()
        optimizer.step()
    assert [name for name, p in adapter.named_parameters() if torch.equal(p, before[name])] == []


def test_convolution():
    torch.manual_seed(0)
    module = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    matrix = module.weight.detach().flatten(1)
    adapter = KaSA().build(site_of("layer", module), 3, 1.0)
    adapter.initialize(matrix, None, torch.Generator().manual_seed(0))
    move(adapter)
    twin = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    twin.load_state_dict(module.state_dict())
    twin.weight.data = (matrix + adapter.delta(matrix).detach()).reshape(module.weight.shape)
    x = torch.randn(2, 3, 9, 9)
    assert torch.allclose(adapter(x, module), twin(x), atol=1e-5)


def test_options():
    assert start(beta=0.0, gamma=0.0)[0].penalty() is None
    site = Site("layer", "linear", 12, 10)
    assert KaSA().check(site, 9) is None
    assert "components, all of which rank 10 would drop; choose a smaller rank" in KaSA().check(site, 10)
    assert "its rank must be 1 to 10, not 11" in KaSA().check(site, 11)
    assert "is of kind embedding" in KaSA().check(Site("layer", "embedding", 12, 10), 3)
    with pytest.raises(ValueError, match="truncation must be one of paper, released, none, not 'half'"):
        KaSA(truncation="half")
    with pytest.raises(ValueError, match="start must be one of normal, ones, not 'zero'"):
        KaSA(start="zero")
    with pytest.raises(ValueError, match="gram must be one of small, large, not 'huge'"):
        KaSA(gram="huge")
    with pytest.raises(ValueError, match="beta must not be negative, not -1; 0 leaves the penalty out"):
        KaSA(beta=-1)
    with pytest.raises(ValueError, match="gamma must not be negative, not nan"):
        KaSA(gamma=float("nan"))
