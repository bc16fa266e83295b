"""SpectralFT against the card's identities, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.site import Site, site_of
from eckart.adapters.spectral_ft import SpectralFT

SITE = Site("layer", "linear", 12, 10)
WEIGHT = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
X = torch.randn(7, 10, generator=torch.Generator().manual_seed(1))
U, S, VH = np.linalg.svd(WEIGHT.double().numpy(), full_matrices=False)


def start(scale=1.0, rank=5, q=2, **options):
    adapter = SpectralFT(q=q, **options).build(SITE, rank, scale)
    adapter.initialize(WEIGHT, None, torch.Generator().manual_seed(0))
    return adapter


def move(adapter):
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapter


def double(tensor):
    return tensor.detach().double().numpy()


def linear():
    base = nn.Linear(10, 12)
    base.weight.data = WEIGHT.clone()
    return base


def corrections(adapter):
    """D_U (out, k) and D_Vᵀ (k, in)."""
    a_u, b_u = double(adapter.left_outer), double(adapter.left_inner)
    a_v, b_v = double(adapter.right_inner), double(adapter.right_outer)
    return adapter.scale * a_u @ b_u, adapter.scale * a_v @ b_v


def principal(adapter):
    """(U_p + D_U) diag(s_p) (V_p + D_V)ᵀ."""
    d_u, d_v = corrections(adapter)
    return (double(adapter.u) + d_u) * double(adapter.s) @ (double(adapter.vh) + d_v)


def test_the_start():
    adapter, base = start(), linear()
    assert torch.equal(adapter(X, base), base(X))
    np.testing.assert_allclose(principal(adapter), U[:, :5] * S[:5] @ VH[:5], atol=1e-5)
    assert not adapter.left_inner.any()
    assert not adapter.right_outer.any()
    # Kaiming uniform is uniform in ± sqrt(6 / fan in), fan in being q.
    for part in (adapter.left_outer, adapter.right_inner):
        assert 0.8 < float(part.detach().abs().max()) / 3**0.5 <= 1


def test_without_the_minor_part_it_starts_as_the_best_approximation_of_rank_k():
    adapter, base = start(keep_minor=False), linear()
    left = double(WEIGHT) + double(adapter.delta(WEIGHT))
    np.testing.assert_allclose(left, U[:, :5] * S[:5] @ VH[:5], atol=1e-5)
    assert np.linalg.norm(double(adapter.delta(WEIGHT))) == pytest.approx(np.sqrt((S[5:] ** 2).sum()), rel=1e-5)
    np.testing.assert_allclose(double(adapter(X, base)), double(X) @ left.T + double(base.bias), atol=1e-5)


@pytest.mark.parametrize("keep_minor", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_layer_has_the_weight_of_the_paper(keep_minor, scale):
    adapter, base = move(start(scale, keep_minor=keep_minor)), linear()
    minor = double(WEIGHT) - double(adapter.u) * double(adapter.s) @ double(adapter.vh) if keep_minor else 0
    expected = principal(adapter) + minor
    np.testing.assert_allclose(double(WEIGHT + adapter.delta(WEIGHT)), expected, atol=1e-5)
    np.testing.assert_allclose(double(adapter(X, base)), double(X) @ expected.T + double(base.bias), atol=1e-4)
    single = double(adapter(X[0], base))
    np.testing.assert_allclose(single, double(X[0]) @ expected.T + double(base.bias), atol=1e-4)


def test_rank_and_row_space_of_the_change():
    adapter = move(start())
    left, right = adapter.low_rank()
    assert (left.shape, right.shape) == ((12, 4), (4, 10))
    delta = double(adapter.delta(WEIGHT))
    assert np.linalg.matrix_rank(delta, tol=1e-4) == 4
    rows = np.concatenate([VH[:5], corrections(adapter)[1]])
    projected = np.linalg.lstsq(rows.T, delta.T, rcond=1e-6)[0]
    np.testing.assert_allclose(rows.T @ projected, delta.T, atol=1e-4)
    assert start(keep_minor=False).low_rank() is None


def test_gradient():
    """dL/dB_U = c A_Uᵀ G V'_p diag(s) and dL/dB_V = c A_Vᵀ diag(s) U'_pᵀ G: the top directions learn fastest."""
    adapter = start(scale=0.5)
    weights = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    (adapter(X, linear()) * weights).sum().backward()
    gradient = double(weights).T @ double(X)
    u, s, vh = double(adapter.u), double(adapter.s), double(adapter.vh)
    left = 0.5 * double(adapter.left_outer).T @ (gradient @ vh.T * s)
    right = 0.5 * double(adapter.right_inner).T @ (s[:, None] * (u.T @ gradient))
    np.testing.assert_allclose(double(adapter.left_inner.grad), left, atol=1e-3 * np.abs(left).max())
    np.testing.assert_allclose(double(adapter.right_outer.grad), right, atol=1e-3 * np.abs(right).max())


@pytest.mark.parametrize("keep_minor", [True, False])
def test_two_steps_move_everything(keep_minor):
    """What the released code does not do."""
    adapter, base = start(keep_minor=keep_minor), linear()
    before = [parameter.detach().clone() for parameter in adapter.parameters()]
    weights = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        (adapter(X, base) * weights).sum().backward()
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, adapter.parameters(), strict=True))


def test_trainable():
    # WavLM-large: query and key of 24 layers, k = 256.
    square = Site("layer", "linear", 1024, 1024)
    assert SpectralFT().trainable(square, 256) == SpectralFT(q=16).trainable(square, 256) == 40_960
    assert 48 * SpectralFT().trainable(square, 256) == 1_966_080
    assert start().num_trainable() == SpectralFT(q=2).trainable(SITE, 5) == 2 * (12 + 10 + 2 * 5)
    assert start(q=None).num_trainable() == 12 + 10 + 2 * 5


@pytest.mark.parametrize("keep_minor", [True, False])
def test_convolution(keep_minor):
    torch.manual_seed(0)
    module, x = nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.randn(2, 3, 9, 9)
    matrix = module.weight.detach().flatten(1).clone()
    adapter = SpectralFT(q=2, keep_minor=keep_minor).build(site_of("layer", module), 4, 0.5)
    adapter.initialize(matrix, None, torch.Generator().manual_seed(0))
    move(adapter)
    with torch.no_grad():
        y = adapter(x, module)
        module.weight.copy_((matrix + adapter.delta(matrix)).reshape(module.weight.shape))
        assert torch.allclose(y, module(x), atol=1e-5)


def test_half_precision_input():
    base = linear().to(torch.bfloat16)
    for keep_minor in (True, False):
        assert move(start(keep_minor=keep_minor))(X.to(torch.bfloat16), base).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q": 0}, "q must be at least 1, not 0; None is a sixteenth of the rank"),
        ({"solver": "fast"}, "solver must be one of auto, exact, lanczos, randomized, not 'fast'"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        SpectralFT(**options)


def test_check():
    assert SpectralFT(q=3).check(SITE, 3) is None
    assert "q must be at most the rank" in SpectralFT(q=4).check(SITE, 3)
    assert "must be 1 to 10, not 11" in SpectralFT().check(SITE, 11)
