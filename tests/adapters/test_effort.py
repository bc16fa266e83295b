"""Effort against the card's identities, in float64, with the Gram matrices that it never forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.effort import Effort
from eckart.adapters.site import Site
from every_kind import every_kind

SHAPES = [(12, 10), (10, 12), (10, 10), (80, 70)]


def start(shape: tuple[int, int] = (12, 10), rank: int = 3, scale: float = 1.0, **options):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    adapter = Effort(**options).build(Site("layer", "linear", *shape), rank, scale)
    adapter.initialize(weight, None, torch.Generator().manual_seed(0))
    return adapter, weight


def move(adapter: nn.Module, size: float = 0.3, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


def wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def split(weight: torch.Tensor, rank: int):
    """U, s and V of what is frozen."""
    u, s, vh = np.linalg.svd(wide(weight), full_matrices=False)
    return u[:, :-rank], s[:-rank], vh[:-rank]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_start_is_the_minor_part(shape, scale):
    adapter, weight = start(shape, scale=scale)
    u, s, vh = np.linalg.svd(wide(weight), full_matrices=False)
    b, d, a = wide(adapter.left), wide(adapter.core), wide(adapter.right)
    np.testing.assert_allclose(scale * (b * d) @ a, (u[:, -3:] * s[-3:]) @ vh[-3:], atol=2e-6 * s[0])
    np.testing.assert_allclose(b.T @ b, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(a @ a.T, np.eye(3), atol=1e-6)
    main = wide(weight) - scale * (b * d) @ a
    np.testing.assert_allclose(main.T @ b, 0, atol=2e-6 * s[0])
    np.testing.assert_allclose(main @ a.T, 0, atol=2e-6 * s[0])
    assert float(adapter.delta(weight).detach().abs().max()) < 1e-6 * s[0]


def test_delta_is_the_formula_and_what_forward_does():
    adapter, weight = start(scale=0.5)
    u, s, vh = split(weight, 3)
    move(adapter)
    b, d, a = wide(adapter.left), wide(adapter.core), wide(adapter.right)
    changed = (u * s) @ vh + 0.5 * (b * d) @ a
    np.testing.assert_allclose(wide(weight) + wide(adapter.delta(weight)), changed, atol=1e-5)
    # The change of the weight from its main part has the rank that is trained.
    assert np.linalg.matrix_rank(wide(weight) + wide(adapter.delta(weight)) - (u * s) @ vh, tol=1e-4) == 3
    base = nn.Linear(10, 12)
    base.weight.data = weight
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(2))
    np.testing.assert_allclose(wide(adapter(x, base)), wide(x) @ changed.T + wide(base.bias), atol=5e-5)


def test_trained_are_the_triplets():
    adapter, _ = start()
    assert {name for name, _ in adapter.named_parameters()} == {"left", "core", "right"}
    assert adapter.num_trainable() == Effort().trainable(adapter.site, 3) == 3 * (12 + 10 + 1)
    # One component of four attention maps of 24 blocks: the paper's 0.19 million.
    assert 24 * 4 * Effort().trainable(Site("layer", "linear", 1024, 1024), 1) == 196_704


@pytest.mark.parametrize("shape", SHAPES)
def test_the_orthogonality_is_that_of_the_whole_bases(shape):
    adapter, weight = start(shape, orthogonality=0.7)
    assert adapter.penalty().item() < 1e-6
    move(adapter, 0.1)
    u, _, vh = split(weight, 3)
    b, a = adapter.left.detach().double(), adapter.right.detach().double()
    b.requires_grad_()
    a.requires_grad_()
    left = torch.cat([torch.from_numpy(u), b], dim=1)
    right = torch.cat([torch.from_numpy(vh), a])
    eye = torch.eye(min(shape), dtype=torch.float64)
    norms = (left.mT @ left - eye).norm(), (right @ right.mT - eye).norm()
    if shape[0] <= shape[1]:  # the paper's (out, out) Gram matrix; where out > n it has the constant out - n too
        outer = (left @ left.mT - torch.eye(shape[0], dtype=torch.float64)).norm()
        assert outer.item() == pytest.approx(norms[0].item())
    expected = 0.7 * (norms[0] + norms[1]) / 2
    # Each smooth root is at most 1e-3 below its norm.
    assert adapter.penalty().item() == pytest.approx(expected.item(), rel=1e-5, abs=0.7e-3)
    expected.backward()
    adapter.penalty().backward()
    np.testing.assert_allclose(wide(adapter.left.grad), b.grad.numpy(), rtol=5e-3, atol=1e-4)
    np.testing.assert_allclose(wide(adapter.right.grad), a.grad.numpy(), rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_norm_that_is_kept_is_that_of_the_whole_weight(shape, scale):
    adapter, weight = start(shape, scale=scale, norm=0.7)
    assert adapter.penalty().item() < 1e-4
    move(adapter, 0.1)
    u, s, vh = split(weight, 3)
    factors = [f.detach().double().requires_grad_() for f in (adapter.left, adapter.core, adapter.right)]
    whole = torch.from_numpy((u * s) @ vh) + scale * (factors[0] * factors[1]) @ factors[2]
    change = (whole.square().sum() - weight.double().square().sum()).abs()
    assert change.item() > 0.1
    # Rounding of float32 products of size ||W||², and the smooth root.
    assert adapter.penalty().item() == pytest.approx(0.7 * change.item(), rel=1e-4, abs=2e-3)
    (0.7 * change).backward()
    adapter.penalty().backward()
    for trained, exact in zip((adapter.left, adapter.core, adapter.right), factors, strict=True):
        np.testing.assert_allclose(wide(trained.grad), exact.grad.numpy(), rtol=5e-3, atol=1e-3)


def test_both_penalties_add_up():
    values = []
    for options in ({"orthogonality": 0.3}, {"norm": 0.2}, {"orthogonality": 0.3, "norm": 0.2}):
        adapter, _ = start(**options)
        move(adapter)
        values.append(adapter.penalty().item())
    assert values[0] + values[1] == pytest.approx(values[2], rel=1e-6)


def test_the_adapter_carries_no_more_than_the_penalties_need():
    names = {"left_start", "core_start", "right_start"}
    for shape, options, extra in (
        ((12, 10), {}, {}),
        ((10, 10), {"orthogonality": 1.0}, {}),
        ((12, 10), {"orthogonality": 1.0}, {"frozen": (7, 12)}),
        ((10, 12), {"orthogonality": 1.0}, {"frozen": (7, 12)}),
        ((12, 10), {"norm": 1.0}, {"main": (12, 10)}),
    ):
        buffers = dict(start(shape, **options)[0].named_buffers())
        assert {name: tuple(buffers[name].shape) for name in buffers.keys() - names} == extra


@pytest.mark.parametrize("shape", [(12, 10), (10, 10)])
def test_all_components_may_be_trained(shape):
    adapter, weight = start(shape, rank=10, orthogonality=1.0, norm=1.0)
    assert adapter.penalty().item() < 1e-3
    move(adapter)
    assert adapter.penalty().item() > 1
    assert bool(adapter.delta(weight).isfinite().all())


def test_autocast_does_not_reach_the_penalty():
    adapter, _ = start(orthogonality=1.0, norm=1.0)
    move(adapter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = adapter.penalty()
    assert torch.equal(inside, adapter.penalty())


def test_gradients_reach_everything_within_two_steps_even_from_a_deficient_weight():
    """A singular value of zero leads: its vectors have no gradient before it has moved."""
    adapter, _ = start()
    adapter.initialize(torch.ones(12, 10), None, torch.Generator())
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
    for adapter in every_kind(Effort(), 1.0):
        move(adapter)


def test_options():
    assert start()[0].penalty() is None
    with pytest.raises(ValueError, match="orthogonality must not be negative, not -1; 0 leaves the penalty out"):
        Effort(orthogonality=-1)
    with pytest.raises(ValueError, match="norm must not be negative, not nan"):
        Effort(norm=float("nan"))
