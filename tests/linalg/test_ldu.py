"""ldu: scipy's LU where there is one, finite factors where there is none, and the Schur complement as the error."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError
from eckart.linalg.ldu import ldu

PIVOTING = ["partial", "complete"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(a, result, pivoting):
    """Shapes, structure and error of one matrix, in float64."""
    dense, eps = a.double(), torch.finfo(result.lower.dtype).eps
    (m, n), k, size = a.shape, result.diagonal.numel(), float(a.double().norm())
    lower, diagonal, upper = (part.double() for part in (result.lower, result.diagonal, result.upper))
    assert (lower.shape, upper.shape) == ((m, k), (k, n))
    assert all(bool(part.isfinite().all()) for part in (lower, diagonal, upper))
    assert sorted(result.rows.tolist()) == list(range(m))
    assert sorted(result.columns.tolist()) == list(range(n))
    assert torch.equal(lower.diagonal(), torch.ones(k).double())
    assert torch.equal(upper.diagonal(), torch.ones(k).double())
    assert torch.equal(lower, lower.tril())
    assert torch.equal(upper, upper.triu())
    assert not lower.numel() or lower.abs().max() <= 1 + 10 * eps
    if pivoting == "complete":
        assert not upper.numel() or upper.abs().max() <= 1 + 10 * eps
    remainder = dense[result.rows][:, result.columns] - lower * diagonal @ upper
    # Elimination grows entries by a factor of ten or so at these sizes.
    rounding = 1000 * eps * size
    assert abs(float(result.error - remainder.norm())) <= rounding + 1e-5 * float(remainder.norm())
    done = int((diagonal != 0).sum()) if pivoting == "complete" else k
    assert remainder[:done].norm() <= rounding
    assert remainder[:, :done].norm() <= rounding
    assert (result.reconstruct().double() - (dense - _back(remainder, result))).norm() <= rounding


def _back(matrix, result):
    original = torch.empty_like(matrix)
    original[result.rows[:, None], result.columns] = matrix
    return original


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12), (1, 6), (6, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_partial_pivoting_is_that_of_lapack(shape, dtype):
    a = normal(*shape).to(dtype)
    result = ldu(a)
    rows, lower, upper = scipy.linalg.lu(a.numpy(), p_indices=True)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    assert result.rows.tolist() == np.argsort(rows).tolist()
    assert result.columns.tolist() == list(range(shape[1]))
    assert np.allclose(result.lower.numpy(), lower, atol=tolerance)
    assert np.allclose(result.diagonal.numpy(), upper.diagonal(), atol=tolerance)
    assert np.allclose((result.diagonal[:, None] * result.upper).numpy(), upper, atol=tolerance)
    assert float(result.error) == 0
    check(a, result, "partial")


@pytest.mark.parametrize("pivoting", PIVOTING)
@pytest.mark.parametrize("shape", [(30, 30), (50, 20), (20, 50)], ids=str)
@pytest.mark.parametrize("rank", [1, 7, 20, 99])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_truncation_leaves_the_schur_complement(pivoting, shape, rank, dtype):
    a = normal(*shape).to(dtype)
    result, whole = ldu(a, rank, pivoting=pivoting), ldu(a, pivoting=pivoting)
    check(a, result, pivoting)
    k = min(rank, *shape)
    assert result.diagonal.numel() == k
    assert torch.allclose(result.lower, whole.lower[:, :k][whole.rows.argsort()][result.rows], atol=1e-3)
    dense = a.double()[result.rows][:, result.columns]
    schur = dense[k:, k:] - dense[k:, :k] @ torch.linalg.inv(dense[:k, :k]) @ dense[:k, k:]
    # The inverse of the leading block loses its condition number, below 1e3 here.
    assert abs(float(result.error - schur.norm())) <= 1e3 * torch.finfo(result.lower.dtype).eps * float(dense.norm())


def test_complete_pivoting_takes_the_largest_entry_left():
    a = normal(9, 7)
    result = ldu(a, pivoting="complete")
    left, pivots = a.numpy().copy(), []
    for _ in range(7):
        i, j = np.unravel_index(np.abs(left).argmax(), left.shape)
        pivots.append((i, j, left[i, j]))
        left -= np.outer(left[:, j], left[i]) / left[i, j]
    assert result.rows[:7].tolist() == [int(i) for i, _, _ in pivots]
    assert result.columns.tolist() == [int(j) for _, j, _ in pivots]
    assert np.allclose(result.diagonal.numpy(), [value for _, _, value in pivots], rtol=1e-10)


def test_complete_pivoting_reveals_the_rank():
    a = normal(60, 4) @ normal(4, 40, seed=1)
    for matrix in (a, a.float()):
        result = ldu(matrix, pivoting="complete")
        assert torch.equal(result.diagonal != 0, torch.arange(40) < 4)
        assert torch.equal(result.upper[4:, 4:], torch.eye(36, dtype=matrix.dtype))
        assert result.error <= 1e3 * torch.finfo(matrix.dtype).eps * matrix.norm()
        assert ldu(matrix, 4, pivoting="complete").error <= 1e3 * torch.finfo(matrix.dtype).eps * matrix.norm()


def test_complete_pivoting_truncates_better_where_the_order_of_columns_misleads():
    a = torch.cat([1e-3 * normal(40, 5, seed=2), normal(40, 5) @ normal(5, 30, seed=1)], dim=1)
    errors = [float(ldu(a, 5, pivoting=pivoting).error) for pivoting in PIVOTING]
    assert errors[1] < 1e-2 * errors[0]


VANISHING = {
    "zero pivot, row not zero": [[0.0, 1.0], [0.0, 2.0]],
    "tiny pivot": [[1e-20, 1.0], [0.0, 2.0]],
    "zero column first": [[0.0, 1.0, 2.0], [0.0, 3.0, 5.0], [0.0, 1.0, 1.0]],
    "zero row": [[1.0, 2.0], [0.0, 0.0]],
    "equal rows": [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]],
    "zero": [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
    "one entry": [[0.0, 0.0, 0.0], [0.0, 0.0, -7.0]],
}


@pytest.mark.parametrize("rows", VANISHING.values(), ids=VANISHING.keys())
@pytest.mark.parametrize("pivoting", PIVOTING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_vanishing_pivots(rows, pivoting, dtype):
    a = torch.tensor(rows, dtype=dtype)
    result = ldu(a, pivoting=pivoting)
    check(a, result, "complete" if result.columns.tolist() != list(range(a.shape[1])) else pivoting)
    assert torch.allclose(result.reconstruct(), a, atol=1e-15)
    rank = int(torch.linalg.matrix_rank(a))
    assert int((result.diagonal != 0).sum()) == rank


def test_tiny_but_regular_pivots_stay():
    a = torch.diag(torch.tensor([1.0, 1e-25, 1e-30], dtype=torch.float64))
    assert torch.equal(ldu(a).diagonal, a.diagonal())


@pytest.mark.parametrize("pivoting", PIVOTING)
@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_scale(pivoting, scale, dtype):
    a = normal(9, 6).to(dtype)
    plain, scaled = ldu(a, 4, pivoting=pivoting), ldu(a * scale, 4, pivoting=pivoting)
    assert torch.equal(plain.rows, scaled.rows)
    assert torch.allclose(plain.upper, scaled.upper, atol=1e-4)
    assert torch.allclose(plain.diagonal.double(), scaled.diagonal.double() / scale, rtol=1e-4)
    assert float(scaled.error) / scale == pytest.approx(float(plain.error), rel=1e-4)


@pytest.mark.parametrize("pivoting", PIVOTING)
@pytest.mark.parametrize("rank", [None, 2])
def test_batch(pivoting, rank):
    special = torch.tensor([[0.0, 1.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 3.0]]).double()
    huge = 1e200 * normal(4, 3, seed=1)
    a = torch.stack([normal(4, 3), special, torch.zeros(4, 3).double(), huge]).reshape(2, 2, 4, 3)
    result = ldu(a, rank, pivoting=pivoting)
    for i in range(2):
        for j in range(2):
            single = ldu(a[i, j], rank, pivoting=pivoting)
            for name, part in result.__dict__.items():
                assert torch.allclose(part[i, j], getattr(single, name)), name
    if rank is None:
        assert torch.allclose(result.reconstruct(), a, rtol=1e-13)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 4), (0, 2, 3)], ids=str)
@pytest.mark.parametrize("pivoting", PIVOTING)
def test_nothing(shape, pivoting):
    result = ldu(torch.zeros(shape), pivoting=pivoting)
    assert result.reconstruct().shape == shape
    assert result.error.shape == shape[:-2]


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    rank=st.one_of(st.none(), st.integers(1, 25)),
    pivoting=st.sampled_from(PIVOTING),
    decimals=st.integers(0, 6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
    seed=st.integers(0, 999),
)
def test_any_matrix(m, n, rank, pivoting, decimals, dtype, seed):
    # Few decimals make zeros and dependent rows common.
    a = (0.7 * normal(m, n, seed=seed)).round(decimals=decimals).to(dtype)
    result = ldu(a, rank, pivoting=pivoting)
    check(a, result, "complete" if result.columns.tolist() != list(range(n)) else pivoting)
    if rank is None:
        assert (result.reconstruct() - a).norm() <= 1e3 * torch.finfo(result.lower.dtype).eps * a.double().norm()


def test_result_repeats_and_input_is_untouched():
    a = normal(20, 30).T.requires_grad_()
    before = a.detach().clone()
    for pivoting in PIVOTING:
        first, second = ldu(a, 5, pivoting=pivoting), ldu(a, 5, pivoting=pivoting)
        assert torch.equal(first.lower, second.lower)
        assert not first.lower.requires_grad
        assert torch.equal(a.detach(), before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ldu(normal(3, 4), 0), ValueError, "rank must be at least 1"),
        (
            lambda: ldu(normal(3, 4), pivoting="rook"),
            ValueError,
            "must be one of partial, complete, not 'rook'",
        ),
        (lambda: ldu(normal(3)), LinalgError, "is not a matrix"),
        (lambda: ldu(normal(3, 4).log()), LinalgError, "a: .*NaN or Inf"),
    ],
)
def test_no_right_answer_is_an_error(call, error, message):
    with pytest.raises(error, match=message):
        call()
