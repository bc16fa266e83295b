"""LoLDU against SciPy's LU, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from eckart.adapters.loldu import LoLDU, initial_diagonal
from eckart.adapters.site import Site
from every_kind import every_kind

OUT, IN, RANK = 12, 10, 3
SITE = Site("layer", "linear", OUT, IN)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def start(weight: torch.Tensor | None = None, rank: int = RANK, scale: float = 1.0, site: Site = SITE, **options):
    weight = randn(site.out_features, site.in_features) if weight is None else weight
    adapter = LoLDU(**options).build(site, rank, scale)
    adapter.initialize(weight, None, torch.Generator().manual_seed(0))
    return adapter, weight


def reference(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P L, D and U by partial pivoting."""
    permuted, upper = scipy.linalg.lu(weight.double().numpy(), permute_l=True)
    diagonal = np.diag(upper)
    return permuted, diagonal, upper / diagonal[:, None]


@pytest.mark.parametrize(("out_features", "in_features"), [(12, 10), (10, 12)])
def test_the_factors_are_those_of_elimination(out_features, in_features):
    adapter, weight = start(site=Site("layer", "linear", out_features, in_features))
    left, diagonal, upper = reference(weight)
    # float32 elimination.
    np.testing.assert_allclose(adapter.left.numpy(), left[:, :RANK], atol=1e-5)
    np.testing.assert_allclose(adapter.core.detach().numpy(), diagonal[:RANK], atol=1e-5)
    np.testing.assert_allclose(adapter.right.numpy(), upper[:RANK], atol=1e-4)
    assert adapter.num_trainable() == LoLDU().trainable(SITE, RANK) == RANK


def test_all_terms_are_the_weight():
    adapter, weight = start(rank=10)
    product = (adapter.left.double() * adapter.core.detach().double()) @ adapter.right.double()
    assert torch.allclose(product, weight.double(), atol=1e-5)


@pytest.mark.parametrize("trained", ["diagonal", "multiplier"])
def test_nothing_changes_at_the_start_and_delta_is_what_forward_does(trained):
    adapter, weight = start(scale=0.5, trained=trained)
    base, x = nn.Linear(IN, OUT), randn(5, IN, seed=3)
    base.weight.data = weight
    assert torch.equal(adapter(x, base), base(x))
    adapter.core.data += torch.tensor([0.3, -0.2, 0.1])
    left, diagonal, upper = reference(weight)
    moved = np.array([0.3, -0.2, 0.1]) * (diagonal[:RANK] if trained == "multiplier" else 1)
    delta = adapter.delta(weight).detach()
    np.testing.assert_allclose(delta.numpy(), 0.5 * (left[:, :RANK] * moved) @ upper[:RANK], atol=1e-5)
    assert torch.allclose(adapter(x, base), x @ (weight + delta).mT + base.bias, atol=1e-5)


@pytest.mark.parametrize("trained", ["diagonal", "multiplier"])
def test_the_gradient_is_the_cards(trained):
    """dL/dz_i = c (P L_i)ᵀ G U_iᵀ with G = dL/dW; times D_i for the multiplier."""
    adapter, weight = start(scale=0.5, trained=trained)
    x, target = randn(5, IN, seed=3), randn(5, OUT, seed=4)
    (adapter.update(x) * target).sum().backward()
    left, diagonal, upper = reference(weight)
    gradient = (target.mT @ x).double().numpy()
    expected = 0.5 * np.einsum("or,oi,ri->r", left[:, :RANK], gradient, upper[:RANK])
    if trained == "multiplier":
        expected = expected * diagonal[:RANK]
    np.testing.assert_allclose(adapter.core.grad.numpy(), expected, atol=1e-4)


def test_a_tiny_pivot_is_trained_as_a_multiplier():
    """The second pivot is 1e-6 of its row: divided by it, U would have entries of 1e6 and so would the gradient."""
    weight = torch.tensor([[2.0, 1.0, 3.0, 1.0], [1.0, 0.5 + 1e-6, 2.0, -1.0], [0.0, 0.0, 1.0, 0.5]])
    site = Site("layer", "linear", 3, 4)
    adapter, _ = start(weight, rank=3, site=site)
    assert float(adapter.right.abs().max()) < 10
    assert adapter.core.tolist()[1] == 1.0
    assert adapter.core.tolist()[0] == 2.0  # the others as in the paper
    product = (adapter.left.double() * adapter.core.detach().double()) @ adapter.right.double()
    assert torch.allclose(product, weight.double(), atol=1e-6)
    zeros, _ = start(weight, rank=3, site=site, init="zeros")
    assert torch.allclose(zeros.delta(weight), -weight, atol=1e-6)


@pytest.mark.parametrize("trained", ["diagonal", "multiplier"])
@pytest.mark.parametrize("kind", ["zero", "dead rows", "rank two"])
def test_weights_without_pivots(kind, trained):
    weight = randn(OUT, IN)
    if kind == "zero":
        weight = torch.zeros(OUT, IN)
    elif kind == "dead rows":
        weight[2:] = 0
    else:
        weight = randn(OUT, 2) @ randn(2, IN, seed=1)
    adapter, _ = start(weight, rank=5, trained=trained)
    tensors = [adapter.left, adapter.right, adapter.core.detach()]
    assert all(bool(t.isfinite().all()) for t in tensors)
    assert float(adapter.right.abs().max()) < 1e3
    product = (adapter.left * adapter.core.detach()) @ adapter.right
    assert torch.allclose(product, weight, atol=1e-5)
    (adapter.update(randn(5, IN, seed=3)) * randn(5, OUT, seed=4)).sum().backward()
    assert bool((adapter.core.grad != 0).all())  # a zero pivot can still be trained


def test_every_other_start_shifts_the_output_by_a_known_amount():
    left, diagonal, upper = reference(randn(OUT, IN))
    for init in ("uniform", "s_uniform", "normal", "s_normal", "constant", "ones", "zeros"):
        for trained in ("diagonal", "multiplier"):
            adapter, weight = start(init=init, trained=trained)
            z = initial_diagonal(torch.tensor(diagonal[:RANK]), init, torch.Generator().manual_seed(0)).numpy()
            expected = (left[:, :RANK] * (z - diagonal[:RANK])) @ upper[:RANK]
            np.testing.assert_allclose(adapter.delta(weight).detach().numpy(), expected, atol=1e-4, err_msg=init)


def test_the_starts_have_the_codes_distributions():
    """On 20000 entries, so that a moment is known to 3 %."""
    given = 2 + 3 * randn(20000)

    def drawn(init: str) -> torch.Tensor:
        return initial_diagonal(given, init, torch.Generator().manual_seed(0))

    assert torch.equal(drawn("lu"), given)
    mean, deviation = float(given.mean()), float(given.std())
    for init, bound in (("uniform", mean / 2), ("s_uniform", 1.0)):
        z = drawn(init)
        assert float(z.abs().max()) <= bound
        assert float(z.std()) == pytest.approx(bound / 3**0.5, rel=0.03)
    for init, centre, width in (("normal", mean, deviation), ("s_normal", 0.0, 1.0)):
        z = drawn(init)
        assert float(z.mean()) == pytest.approx(centre, abs=0.03 * width)
        assert float(z.std()) == pytest.approx(width, rel=0.03)
    assert drawn("constant").unique().tolist() == pytest.approx([mean])
    assert (drawn("ones").unique().tolist(), drawn("zeros").unique().tolist()) == ([1.0], [0.0])
    assert initial_diagonal(torch.tensor([2.0]), "normal", torch.Generator()).tolist() == [2.0]  # no deviation of one


def test_convolution_and_embedding():
    for adapter in every_kind(LoLDU(), 1.0):
        adapter.core.data += 0.1


def test_messages():
    with pytest.raises(ValueError, match=r"init must be one of lu, uniform, .* not 'random'"):
        LoLDU(init="random")
    with pytest.raises(ValueError, match="trained must be one of diagonal, multiplier, not 'all'"):
        LoLDU(trained="all")
