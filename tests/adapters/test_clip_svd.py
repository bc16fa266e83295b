"""CLIP-SVD against the card's identities, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.clip_svd import CLIPSVD
from eckart.adapters.site import Site, site_of

WEIGHT = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
X = torch.randn(7, 10, generator=torch.Generator().manual_seed(1))
U, S, VH = np.linalg.svd(WEIGHT.double().numpy(), full_matrices=False)


def start(rank=10, scale=1.0, **options):
    adapter = CLIPSVD(**options).build(Site("layer", "linear", 12, 10), rank, scale)
    adapter.initialize(WEIGHT, None, torch.Generator().manual_seed(0))
    return adapter


def double(tensor):
    return tensor.detach().double().numpy()


def linear():
    base = nn.Linear(10, 12)
    base.weight.data = WEIGHT.clone()
    return base


@pytest.mark.parametrize("trained", ["value", "shift", "multiplier"])
def test_nothing_changes_at_the_start(trained):
    base, adapter = linear(), start(trained=trained)
    assert torch.equal(adapter(X, base), base(X))
    np.testing.assert_allclose(double(adapter.left.mT @ adapter.left)[0, 1:], 0, atol=1e-5 * S[0] ** 2)


def test_the_layer_is_the_factored_one_of_the_paper():
    """y = U (z * Vᵀ x) + bias, with no W left; and that is what the delta folds into."""
    adapter, base = start(), linear()
    np.testing.assert_allclose(double(adapter.core), S, atol=1e-5)
    z = np.linspace(-1, 3, 10)
    adapter.core.data = torch.tensor(z, dtype=torch.float32)
    factored = double(X) @ (U * z @ VH).T + double(base.bias)
    np.testing.assert_allclose(double(adapter(X, base)), factored, atol=1e-4)
    folded = double(WEIGHT) + double(adapter.delta(WEIGHT))
    np.testing.assert_allclose(folded, U * z @ VH, atol=1e-5)


def test_gradient_and_what_training_leaves_alone():
    adapter = start()
    frozen = {name: value.clone() for name, value in adapter.named_buffers()}
    weights = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    (adapter(X, linear()) * weights).sum().backward()
    expected = np.einsum("oi,on,in->i", U, double(weights).T @ double(X), VH)
    np.testing.assert_allclose(double(adapter.core.grad), expected, atol=1e-4)
    torch.optim.SGD(adapter.parameters(), lr=0.1).step()
    assert all(torch.equal(value, frozen[name]) for name, value in adapter.named_buffers())


def test_every_layer_gets_all_of_its_singular_values():
    """Six matrices of width d, one of them (4 d, d), one (d, 4 d), in 12 blocks of both towers of CLIP ViT-B/16."""

    def block(d):
        shapes = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "up": (4 * d, d), "down": (d, 4 * d)}
        return {name: Site(name, "linear", *shape) for name, shape in shapes.items()}

    method, total = CLIPSVD(ratio=1), 0
    for d in (768, 512):
        sites = block(d)
        ranks = method.ranks(sites, {}, 16, lambda name: torch.zeros(0))
        total += 12 * sum(method.trainable(sites[name], rank) for name, rank in ranks.items())
    assert total == 92_160


def test_ratio():
    sites = {"a": Site("a", "linear", 10, 30), "b": Site("b", "linear", 3, 3)}
    assert CLIPSVD(ratio=0.25).ranks(sites, {}, 16, lambda name: torch.zeros(0)) == {"a": 2, "b": 1}
    assert CLIPSVD().ranks(sites, {}, 16, lambda name: torch.zeros(0)) is None
    assert "must be 1 to 3, not 16" in CLIPSVD().check(sites["b"], 16)
    assert CLIPSVD(ratio=0.25).check(sites["b"], 16) is None  # 16 is not used


def test_a_rank_limits_it_to_the_largest():
    adapter = start(rank=4)
    assert adapter.num_trainable() == 4
    np.testing.assert_allclose(double(adapter.core), S[:4], rtol=1e-5)
    assert float(adapter.energy) == pytest.approx((S[:4] ** 2).sum() / (S**2).sum(), rel=1e-6)


def test_convolution():
    torch.manual_seed(0)
    module, x = nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.randn(2, 3, 9, 9)
    matrix = module.weight.detach().flatten(1).clone()
    adapter = CLIPSVD().build(site_of("layer", module), 8, 1.0)
    adapter.initialize(matrix, None, torch.Generator())
    adapter.core.data *= 1.5  # all of W
    with torch.no_grad():
        y = adapter(x, module)
        module.weight.mul_(1.5)
        assert torch.allclose(y, module(x), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio is a share of the singular values, above 0 and at most 1, not 0.0"),
        ({"ratio": float("nan")}, "ratio is a share"),
        ({"trained": "log"}, "trained must be one of value, shift, multiplier, not 'log'"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        CLIPSVD(**options)
