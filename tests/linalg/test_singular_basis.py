"""All singular vectors by one side: against LAPACK, on every shape, rank-deficient and badly scaled."""

from __future__ import annotations

import math

import pytest
import torch

from eckart.linalg import LinalgError, SingularBasis


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24), (1, 5), (5, 1)])
@pytest.mark.parametrize("scale", [1.0, 1e150, 1e-150])
def test_equals_lapack(shape, scale):
    a = _draw(*shape) * scale
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    basis = SingularBasis(a)
    assert basis.rank == min(shape)
    assert torch.allclose(basis.values / scale, s / scale, rtol=1e-7)
    k = min(3, min(shape))
    x = _draw(shape[0], 2)
    assert torch.allclose((basis.left(k).mT @ u[:, :k]).abs(), torch.eye(k, dtype=a.dtype), atol=1e-7)
    assert torch.allclose((basis.right(k).mT @ vh[:k].mT).abs(), torch.eye(k, dtype=a.dtype), atol=1e-7)
    assert torch.allclose(basis.left_products(x).abs(), (x.mT @ u).abs(), atol=1e-7)
    # the two sides belong together
    assert torch.allclose(a / scale @ basis.right(k), basis.left(k) * basis.values[:k] / scale, atol=1e-7)


def test_what_has_no_direction_is_left_out():
    a = _draw(30, 4) @ _draw(4, 20)
    basis = SingularBasis(a.float())
    assert basis.rank == 4
    assert basis.left(10).shape == (30, 4)
    # only the part inside the range of a is seen
    inside, outside = a[:, :1], _draw(30, 1)
    assert float(basis.left_products(inside).norm()) == pytest.approx(float(inside.norm()), rel=1e-6)
    assert float(basis.left_products(outside).norm()) < 0.8 * float(outside.norm())
    assert SingularBasis(torch.zeros(3, 4)).rank == 0
    assert SingularBasis(torch.zeros(3, 4)).left_products(torch.ones(3, 2)).shape == (2, 0)


def test_nan_is_refused():
    with pytest.raises(LinalgError, match="NaN"):
        SingularBasis(torch.full((3, 3), math.nan))
