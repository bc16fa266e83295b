from __future__ import annotations

import numpy as np
import pytest
import torch

from eckart.linalg._basis import extend, orthonormalize
from eckart.linalg._prepare import squared_norm

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("condition", [1, 1e3, 1e5, 1e8, 1e12, 1e16, np.inf])
def test_orthonormalize_at_any_condition_number(condition, dtype, known):
    s = np.logspace(0, -np.log10(condition), 10) if np.isfinite(condition) else np.r_[np.ones(4), np.zeros(6)]
    y = known(50, 10, s).to(dtype)
    q, r = orthonormalize(y)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(q.double().T @ q.double(), torch.eye(10).double(), atol=20 * eps)
    assert torch.allclose(q.double() @ r, y.double(), atol=20 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outside", [1.0, 1e-3, 1e-6, 1e-12, 0.0])
def test_extend_stays_orthonormal_when_little_is_new(outside, dtype, known):
    basis = known(60, 12, np.ones(12)).to(dtype)
    basis = torch.linalg.qr(basis)[0]
    new = (basis.double() @ known(12, 5, np.ones(5), 1) + outside * known(60, 5, np.ones(5), 2)).to(dtype)
    coupling, fresh, growth = extend(basis, new)
    both, eps = torch.cat([basis, fresh], dim=1).double(), torch.finfo(dtype).eps
    assert torch.allclose(both.T @ both, torch.eye(17).double(), atol=30 * eps)
    assert torch.allclose(basis.double() @ coupling + fresh.double() @ growth, new.double(), atol=30 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extend_completes_what_a_full_support_cannot_hold(dtype, known):
    # All columns vanish outside 12 coordinates, 10 of which the basis has: only 2 of the 5 new directions exist there.
    basis, new = torch.zeros(60, 10, dtype=torch.float64), torch.zeros(60, 5, dtype=torch.float64)
    basis[:12], new[:12] = known(12, 10, np.ones(10)), known(12, 5, np.ones(5), 1)
    basis, new = basis.to(dtype), new.to(dtype)
    coupling, fresh, growth = extend(basis, new)
    both, eps = torch.cat([basis, fresh], dim=1).double(), torch.finfo(dtype).eps
    assert torch.allclose(both.T @ both, torch.eye(15).double(), atol=30 * eps)
    assert torch.allclose(basis.double() @ coupling + fresh.double() @ growth, new.double(), atol=30 * eps)


def test_extend_of_nothing_is_orthonormalize(known):
    y = known(20, 4, [4, 3, 2, 1])
    coupling, fresh, growth = extend(y[:, :0], y)
    assert coupling.shape == (0, 4)
    assert torch.allclose(fresh @ growth, y, atol=1e-14)


@pytest.mark.parametrize("shape", [(3, 4), (1000, 300), (2, 3, 500, 400), (0, 3), (2, 0, 3)], ids=str)
def test_squared_norm_is_accurate_in_any_layout(shape):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    truth = (a.double().numpy() ** 2).sum(axis=(-2, -1))
    # The float32 sums round at random, so their total is good to about 1e-8; float64 to its own rounding.
    for dtype, rtol in ((torch.float32, 1e-7), (torch.float64, 1e-14)):
        x = a.to(dtype)
        for layout in (x, x.mT, x.mT.contiguous().mT):
            assert np.allclose(squared_norm(layout).numpy(), truth, rtol=rtol, atol=0)
