"""pivot_rows: the rows combine as promised, with small coefficients, whatever the matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eckart.linalg import LinalgError, pivot_rows


def gaussian(m: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(m, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(m: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(gaussian(m, k, seed))[0]


def growing(k: int) -> Tensor:
    """Unit lower triangular with -1 below the diagonal, then rows of ones: LU alone leaves coefficients near 2^k."""
    return torch.cat([torch.eye(k) - torch.ones(k, k).tril(-1), torch.ones(3, k)]).double()


def deficient(m: int, k: int, rank: int) -> Tensor:
    return gaussian(m, rank, 1) @ gaussian(rank, k, 2)


CASES = {
    "gaussian": gaussian(40, 12),
    "orthonormal": orthonormal(40, 12),
    "tall": gaussian(600, 3),
    "one column": gaussian(9, 1),
    "square": gaussian(8, 8),
    "one by one": gaussian(1, 1),
    "no columns": gaussian(5, 0),
    "12 decades": orthonormal(50, 13) * torch.logspace(0, -12, 13, dtype=torch.float64),
    "12 decades, mixed": orthonormal(50, 13) * torch.logspace(0, -12, 13) @ orthonormal(13, 13, 3),
    "huge": gaussian(20, 5) * 1e300,
    "tiny": gaussian(20, 5) * 1e-300,
    "rank 3 of 7": deficient(30, 7, 3),
    "repeated columns": gaussian(30, 2)[:, [0, 0, 1, 1, 0]],
    "repeated rows": gaussian(3, 3).repeat(7, 1),
    "zero": torch.zeros(6, 3, dtype=torch.float64),
    "zero columns": gaussian(9, 4) * torch.tensor([1.0, 0.0, 1.0, 0.0]),
    "binary": (gaussian(64, 16) > 0).double(),
    "growth 10": growing(10),
    "growth 50": growing(50),
    "transposed view": gaussian(6, 30).T,
    "float32": gaussian(30, 6).float(),
    "bfloat16": gaussian(30, 6).bfloat16(),
    "float16": gaussian(30, 6).half(),
}


@pytest.mark.parametrize("basis", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("bound", [1.05, 2.0, 10.0])
def test_rest_is_a_small_combination_of_kept(basis: Tensor, bound: float) -> None:
    check(basis, bound)


def check(basis: Tensor, bound: float) -> None:
    m, k = basis.shape
    pivots = pivot_rows(basis, bound=bound)
    assert torch.equal(torch.cat([pivots.kept, pivots.rest]).sort().values, torch.arange(m))
    assert pivots.combination.shape == (m - k, k)
    assert pivots.combination.dtype == torch.float64
    if pivots.combination.numel():
        assert pivots.combination.abs().max() <= bound
    exact = basis.double()
    exact = exact / exact.abs().amax().clamp(min=1e-320) if exact.numel() else exact
    residual = pivots.combination @ exact[pivots.kept] - exact[pivots.rest]
    # Backward error of LU with pivoting: a modest multiple of eps (2.2e-16) times k times the size of each column.
    assert (residual.abs() <= 1e-15 * (k + 10) * bound * exact.abs().sum(0)).all()


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 30), k=st.integers(1, 30), decimals=st.integers(0, 2), seed=st.integers(0, 10**6))
def test_rest_is_a_small_combination_for_any_shape(m: int, k: int, decimals: int, seed: int) -> None:
    # Few decimals make ties, zeros and dependent columns common.
    check(gaussian(max(m, k), min(m, k), seed).round(decimals=decimals), 2.0)


def test_each_column_is_accurate_at_its_own_scale() -> None:
    scales = torch.logspace(0, -200, 9, dtype=torch.float64)
    basis = gaussian(40, 9)
    pivots, scaled = pivot_rows(basis), pivot_rows(basis * scales)
    assert torch.equal(pivots.kept, scaled.kept)
    residual = scaled.combination @ (basis * scales)[scaled.kept] - (basis * scales)[scaled.rest]
    assert (residual.abs() <= 1e-13 * scales).all()


def test_exchanges_are_made_where_lu_is_not_enough() -> None:
    basis = growing(10)
    start = basis[10:] @ torch.linalg.inv(basis[:10])
    assert start.abs().max() > 500
    kept = pivot_rows(basis).kept
    assert torch.linalg.det(basis[kept]).abs() > 100 * torch.linalg.det(basis[:10]).abs()


def test_no_single_exchange_gains_more_than_the_bound() -> None:
    basis = gaussian(12, 4, seed=5)
    pivots = pivot_rows(basis, bound=1.5)
    volume = torch.linalg.det(basis[pivots.kept]).abs()
    for column in range(4):
        for row in pivots.rest.tolist():
            other = pivots.kept.clone()
            other[column] = row
            assert torch.linalg.det(basis[other]).abs() <= 1.5 * volume * (1 + 1e-12)


def test_result_repeats_and_input_is_untouched() -> None:
    basis = gaussian(30, 8).requires_grad_()
    before = basis.detach().clone()
    first, second = pivot_rows(basis), pivot_rows(basis)
    assert torch.equal(first.kept, second.kept)
    assert torch.equal(first.combination, second.combination)
    assert not first.combination.requires_grad
    assert torch.equal(basis.detach(), before)


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        (gaussian(3, 4), r"\(3, 4\), dtype float64.*reduce its rank"),
        (gaussian(4, 3)[None], r"\(1, 4, 3\)"),
        (gaussian(4, 3).long(), "int64"),
        (gaussian(4, 3).log(), "NaN or Inf"),
    ],
    ids=["wide", "batched", "integer", "nan"],
)
def test_impossible_input_is_named(basis: Tensor, message: str) -> None:
    with pytest.raises(LinalgError, match=message):
        pivot_rows(basis)


@pytest.mark.parametrize("bound", [1.0, 0.0, float("nan")])
def test_bound_must_exceed_one(bound: float) -> None:
    with pytest.raises(ValueError, match="bound must be above 1"):
        pivot_rows(gaussian(4, 2), bound=bound)
