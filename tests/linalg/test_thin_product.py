"""A product of thin factors: its spectrum and its angles equal those of the matrix that is never formed."""

from __future__ import annotations

import pytest
import torch

from eckart.linalg import LinalgError, product_cosine, product_singular_values


def _factors(tokens, m, n, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, size, generator=generator, dtype=torch.float64).to(dtype) for size in (m, n))


@pytest.mark.parametrize("tokens", [1, 5, 11, 12, 40])
@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 12), (12, 12)])
def test_singular_values_equal_those_of_the_product(tokens, m, n):
    d, x = _factors(tokens, m, n)
    d[tokens // 2 :: 3] = 0  # tokens without a gradient
    exact = torch.linalg.svdvals(d.mT @ x)
    found = product_singular_values(d, x)
    signal = int(d.any(dim=1).sum())
    assert len(found) == min(m, n, signal)
    assert found == pytest.approx(exact[: len(found)], rel=1e-10, abs=1e-12 * float(exact[0]))
    assert float(exact[len(found) :].sum()) < 1e-10


def test_float32_keeps_the_tail():
    d, x = _factors(40, 96, 128, dtype=torch.float32)
    exact = torch.linalg.svdvals(d.double().mT @ x.double())[:40]
    assert product_singular_values(d, x) == pytest.approx(exact, rel=1e-5)
    assert product_singular_values(1e-20 * d, 1e-20 * x) == pytest.approx(1e-40 * exact, rel=1e-5)


def test_nothing_and_nan():
    assert product_singular_values(torch.zeros(4, 3), torch.ones(4, 5)).tolist() == []
    assert product_singular_values(torch.zeros(0, 3), torch.zeros(0, 5)).tolist() == []
    with pytest.raises(LinalgError, match="NaN"):
        product_singular_values(torch.tensor([[float("nan"), 1.0, 0.0]]), torch.ones(1, 4))


@pytest.mark.parametrize(("one", "two"), [(3, 7), (30, 5), (30, 30)])
def test_cosine_equals_that_of_the_products(one, two):
    first, second = _factors(one, 8, 10), _factors(two, 8, 10, seed=1)
    a, b = (d.mT @ x for d, x in (first, second))
    exact = float((a * b).sum() / a.norm() / b.norm())
    assert product_cosine(first, second) == pytest.approx(exact, abs=1e-12)
    assert product_cosine(first, first) == pytest.approx(1)


def test_cosine_of_other_shapes_or_of_nothing():
    first = _factors(3, 8, 10)
    assert product_cosine(first, _factors(3, 10, 8)) is None
    assert product_cosine(first, (torch.zeros(3, 8), torch.ones(3, 10))) is None
