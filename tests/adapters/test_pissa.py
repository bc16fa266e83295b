"""PiSSA against the card's identities, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.pissa import PiSSA
from eckart.adapters.site import Site
from every_kind import every_kind

SITE = Site("layer", "linear", 12, 10)


def start(site: Site = SITE, rank: int = 3, scale: float = 1.0, **options):
    weight = torch.randn(site.out_features, site.in_features, generator=torch.Generator().manual_seed(0))
    adapter = PiSSA(**options).build(site, rank, scale)
    adapter.initialize(weight, None, torch.Generator().manual_seed(0))
    return adapter, weight


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25])
def test_the_start_is_the_principal_part(scale):
    adapter, weight = start(scale=scale)
    u, s, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    best = (u[:, :3] * s[:3]) @ vh[:3]
    left, right = adapter.left.detach().double().numpy(), adapter.right.detach().double().numpy()
    np.testing.assert_allclose(scale * left @ right, best, atol=1e-5)
    # ||B[:, i]||^2 = ||A[i]||^2 = s_i / c, and both Gram matrices are diagonal.
    np.testing.assert_allclose(left.T @ left, np.diag(s[:3] / scale), atol=1e-6 * s[0] / scale)
    np.testing.assert_allclose(right @ right.T, np.diag(s[:3] / scale), atol=1e-6 * s[0] / scale)
    residual = np.linalg.norm(weight.double().numpy() - scale * left @ right)
    assert residual == pytest.approx(np.sqrt((s[3:] ** 2).sum()), rel=1e-5)


def test_nothing_changes_at_the_start():
    adapter, weight = start()
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    base = nn.Linear(10, 12)
    base.weight.data = weight
    assert torch.allclose(adapter(x, base), base(x), atol=1e-5)


def test_as_a_plain_lora_it_has_twice_the_rank():
    """Δ = c [B | B_0] [A; -A_0], the card's conversion."""
    adapter, _ = start(scale=0.5)
    b0, a0 = adapter.left.detach().double(), adapter.right.detach().double()
    adapter.left.data += 0.1
    adapter.right.data -= 0.2
    left, right = adapter.low_rank()
    assert (left.shape, right.shape) == ((12, 6), (6, 10))
    expected = 0.5 * (adapter.left.detach().double() @ adapter.right.detach().double() - b0 @ a0)
    assert torch.allclose((left @ right).detach().double(), expected, atol=1e-6)


def test_convolution_and_embedding():
    for adapter in every_kind(PiSSA(), 1.0):
        adapter.left.data += 0.1


def test_options():
    exact, _ = start(solver="exact")
    auto, _ = start()
    assert torch.allclose(exact.left @ exact.right, auto.left @ auto.right, atol=1e-5)
    with pytest.raises(ValueError, match="solver must be one of auto, exact, lanczos, randomized, not 'fast'"):
        PiSSA(solver="fast")
