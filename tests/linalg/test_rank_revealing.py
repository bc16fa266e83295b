"""rank_revealing_qr: the bounds of Gu and Eisenstat, also on the matrices where plain pivoting misses them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError, pivot_rows, svd
from eckart.linalg.rank_revealing import _exchange, rank_revealing_qr


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kahan(n, c):
    """Pivoted QR leaves it as it is, although its last columns are nearly dependent (scaled to break the ties)."""
    s = np.sqrt(1 - c * c)
    upper = np.diag(s ** np.arange(n)) @ (np.eye(n) - c * np.triu(np.ones((n, n)), 1))
    return torch.from_numpy(upper * np.linspace(1, 1 - 1e-10 * n, n))


def graded(m, n, decades, seed=0):
    scales = torch.logspace(0, -decades, n, dtype=torch.float64)
    return normal(m, n, seed=seed) * scales @ torch.linalg.qr(normal(n, n, seed=seed + 1))[0]


def check(a, result, bound):
    """Every promise of the docstring, in float64."""
    dense, k, n = a.double(), result.rank, a.shape[1]
    size, eps = float(dense.norm()) or 1.0, torch.finfo(result.q.dtype).eps
    assert sorted(result.permutation.tolist()) == list(range(n))
    assert torch.equal(result.columns, result.permutation[:k])
    assert torch.equal(result.permutation[k:], result.permutation[k:].sort().values)
    q, r, triangle = result.q.double(), result.r.double(), result.r[:, :k].double()
    # A few dozen roundings in each inner product of some hundred terms.
    assert torch.allclose(q.T @ q, torch.eye(k).double(), atol=100 * eps)
    assert torch.equal(triangle, triangle.triu())
    assert (triangle.diagonal() > 0).all()
    remainder = dense[:, result.permutation] - q @ r
    assert (result.reconstruct().double() - q @ r[:, result.permutation.argsort()]).norm() <= 10 * eps * size
    # The error is the root of a difference of squares, good to one part in a thousand where it is not rounding.
    assert abs(float(result.error - remainder.norm())) <= 2e-3 * float(remainder.norm()) + 100 * eps * size
    assert (triangle @ result.coefficients - r[:, k:]).norm() <= 100 * eps * size
    factor = (1 + bound**2 * k * (n - k)) ** 0.5
    s, inner, outer = (torch.linalg.svdvals(part) for part in (dense, triangle, remainder))
    assert (inner * factor >= s[:k] - 100 * eps * size).all()
    assert (outer[: len(s) - k] <= s[k:] * factor + 100 * eps * size).all()
    if result.coefficients.numel():
        assert result.coefficients.abs().max() <= bound * (1 + 1e-6)
        if inner[-1] > 1e4 * eps * size:
            # No exchange raises the volume by more than the bound (the gains of Gu and Eisenstat, Lemma 3.1).
            rows, columns = torch.linalg.inv(triangle).norm(dim=1), remainder[:, k:].norm(dim=0)
            gains = result.coefficients.square() + torch.outer(rows, columns).square()
            assert gains.max().sqrt() <= bound * (1 + 1e-3)


CASES = {
    "gaussian": (normal(60, 50), 20),
    "wide": (normal(30, 90), 10),
    "tall, sketched": (normal(400, 90), 20),
    "two blocks": (normal(300, 200), 100),
    "full rank": (normal(40, 25), 25),
    "all rows": (normal(25, 40), 25),
    "graded": (graded(80, 60, 12), 25),
    "graded below rounding": (graded(200, 60, 30), None),
    "rank 7": (normal(200, 7) @ normal(7, 90, seed=1), None),
    "rank 7, asked for 20": (normal(200, 7) @ normal(7, 90, seed=1), 20),
    "kahan": (kahan(90, 0.285), 89),
    "kahan, half": (kahan(90, 0.285), 45),
    "kahan, steep": (kahan(50, 0.5), 49),
    "binary": ((normal(64, 48) > 0).double(), 16),
    "repeated columns": (normal(30, 4)[:, [0, 0, 1, 2, 1, 3, 3]], None),
    "one column": (normal(9, 1), 1),
    "one row": (normal(1, 9), 1),
    "transposed view": (normal(50, 200).T, 12),
}


@pytest.mark.parametrize(("a", "rank"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bound", [1.05, 2.0])
def test_strong_bounds(a, rank, bound, dtype):
    a = a.to(dtype)
    result = rank_revealing_qr(a, rank, bound=bound)
    assert result.q.dtype == result.r.dtype == dtype
    assert result.coefficients.dtype == result.error.dtype == torch.float64
    check(a, result, bound)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    rank=st.one_of(st.none(), st.integers(1, 45)),
    decades=st.sampled_from([0, 3, 10, 40]),
    decimals=st.integers(0, 8),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_strong_bounds_for_any_matrix(m, n, rank, decades, decimals, dtype, seed):
    # Few decimals make ties, zeros and dependent columns common.
    a = graded(m, n, decades, seed).round(decimals=decimals).to(dtype)
    check(a, rank_revealing_qr(a, rank), 2.0)


def test_kahan_needs_the_exchange():
    a = kahan(90, 0.285)
    weak, strong = rank_revealing_qr(a, 89, strong=False), rank_revealing_qr(a, 89)
    assert weak.permutation.tolist() == list(range(90))
    s = torch.linalg.svdvals(a)
    assert torch.linalg.svdvals(weak.r[:, :89])[-1] < 1e-8 * s[88]
    assert torch.linalg.svdvals(strong.r[:, :89])[-1] > 0.5 * s[88]
    assert weak.coefficients.abs().max() > 1e8


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (100, 100)], ids=str)
@pytest.mark.parametrize("side", ["rows", "columns"])  # graded rows: lengths fall far below those of the columns
def test_pivots_of_a_small_matrix_are_those_of_lapack(shape, side):
    (m, n), k = shape, min(shape)
    scales = torch.logspace(0, -9, m if side == "rows" else n, dtype=torch.float64)
    a = normal(m, n) * (scales[:, None] if side == "rows" else scales)
    result = rank_revealing_qr(a, k, strong=False)
    _, triangle, permutation = scipy.linalg.qr(a.numpy(), pivoting=True, mode="economic")
    assert result.columns.tolist() == permutation[:k].tolist()
    assert np.allclose(result.r[:, :k].diagonal().numpy(), np.abs(triangle.diagonal()), rtol=1e-5)


def test_sketched_pivots_are_as_good_as_those_of_lapack():
    a = graded(500, 300, 3)
    result = rank_revealing_qr(a, 100, strong=False)
    triangle = scipy.linalg.qr(a.numpy(), pivoting=True, mode="r")[0]
    # Different columns of the same quality: the sketch tells lengths to some 20 %.
    assert float(result.error) <= 1.1 * np.linalg.norm(triangle[100:, 100:])


def test_updates_of_an_exchange():
    a, kept, x = normal(30, 20), torch.arange(6), torch.linalg.pinv(normal(30, 20)[:, :6]) @ normal(30, 20)
    residuals = (a - a[:, :6] @ x).square().sum(0)
    count = _exchange(a, kept, torch.linalg.pinv(a[:, :6]), x, residuals, 1.01)
    assert count >= 3
    chosen = a[:, kept]
    assert torch.allclose(residuals, (a - chosen @ torch.linalg.pinv(chosen) @ a).square().sum(0), atol=1e-12)
    before, after = (torch.linalg.det(part.T @ part) ** 0.5 for part in (a[:, :6], chosen))
    assert after >= 1.01**count * before


@pytest.mark.parametrize("rank", [1, 5, 64, 70])
def test_numerical_rank(rank):
    a = normal(300, rank) @ normal(rank, 150, seed=1)
    assert rank_revealing_qr(a).rank == rank
    assert rank_revealing_qr(a.float()).rank == rank
    assert rank_revealing_qr(a, rank + 10).rank == rank


def test_tol_is_relative_to_the_first_pivot():
    a = torch.diag(torch.tensor([1.0, 1e-2, 1e-4, 0.0])) * 50
    assert [rank_revealing_qr(a, tol=tol).rank for tol in (0.0, 1e-5, 1e-3, 0.1)] == [3, 3, 2, 1]


def test_interpolation_of_singular_vectors():
    """HIR-Diff's coefficients E = V_r V_r[b]⁻¹ of r bands: E[b] = I, |E| <= 1.2, no sign or rotation of V_r matters."""
    v = svd(normal(200, 3) @ normal(3, 31, seed=1) + 0.01 * normal(200, 31, seed=2), 3, driver="exact").vh.T
    result = rank_revealing_qr(v.T, 3, bound=1.2)
    bands, e = result.columns, v @ torch.linalg.inv(v[result.columns])
    assert torch.allclose(e[bands], torch.eye(3).double(), atol=1e-14)
    assert e.abs().max() <= 1.2
    assert torch.allclose(e[result.permutation[3:]], result.coefficients.T, atol=1e-13)
    turned = rank_revealing_qr(torch.linalg.qr(normal(3, 3))[0] @ v.T, 3, bound=1.2)
    assert sorted(turned.columns.tolist()) == sorted(bands.tolist())


def test_pivot_rows_of_singular_vectors_gives_the_bounds_on_singular_values():
    """What the module says about the other way: it selects as well, but needs the SVD."""
    a, k = graded(80, 60, 6), 15
    _, s, vh, _ = svd(a, driver="exact")
    columns = a[:, pivot_rows(vh[:k].T).kept]
    factor = (1 + 4 * k * (60 - k)) ** 0.5
    assert (torch.linalg.svdvals(columns) * factor >= s[:k]).all()
    residual = columns @ torch.linalg.pinv(columns) @ a - a
    assert (torch.linalg.svdvals(residual)[: 60 - k] <= s[k:] * factor + 1e-14).all()
    assert float(rank_revealing_qr(a, k).error) <= 2 * float(residual.norm())


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_scale(scale, dtype):
    a = normal(200, 60).to(dtype)
    plain, scaled = rank_revealing_qr(a, 12), rank_revealing_qr(a * scale, 12)
    assert torch.equal(plain.permutation, scaled.permutation)
    assert torch.allclose(plain.r.double(), scaled.r.double() / scale, atol=1e-4)
    assert abs(float(scaled.error) / scale - float(plain.error)) <= 1e-5 * float(plain.error)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (4, 5)], ids=str)
def test_nothing_has_rank_zero(shape):
    result = rank_revealing_qr(torch.zeros(shape))
    assert result.rank == 0
    assert float(result.error) == 0
    assert torch.equal(result.reconstruct(), torch.zeros(shape))
    assert result.permutation.tolist() == list(range(shape[1]))


def test_whole_matrix_has_no_error():
    for a in (normal(20, 30), normal(30, 20), normal(200, 150).float()):
        result = rank_revealing_qr(a)
        assert result.rank == min(a.shape)
        assert float(result.error) == 0
        assert torch.allclose(result.reconstruct(), a, atol=1e-4 if a.dtype == torch.float32 else 1e-12)


def test_result_repeats_and_input_is_untouched():
    a = normal(400, 80).requires_grad_()
    before, state = a.detach().clone(), torch.get_rng_state()
    first, second = rank_revealing_qr(a, 10), rank_revealing_qr(a, 10)
    assert torch.equal(first.permutation, second.permutation)
    assert torch.equal(first.r, second.r)
    assert not first.r.requires_grad
    assert torch.equal(a.detach(), before)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = rank_revealing_qr(a, 10, generator=torch.Generator().manual_seed(5))
    check(a.detach(), drawn, 2.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rank_revealing_qr(normal(3, 4), 0), ValueError, "rank must be at least 1, not 0"),
        (lambda: rank_revealing_qr(normal(3, 4), tol=-1.0), ValueError, "tol must be at least 0"),
        (lambda: rank_revealing_qr(normal(3, 4), bound=1.0), ValueError, "bound must be above 1"),
        (lambda: rank_revealing_qr(normal(2, 3, 4)), LinalgError, "is a batch; call this for each matrix"),
        (lambda: rank_revealing_qr(normal(3)), LinalgError, "is not a matrix"),
        (lambda: rank_revealing_qr(normal(3, 4).long()), LinalgError, "not real floating point"),
        (lambda: rank_revealing_qr(normal(3, 4).log()), LinalgError, "a: .*NaN or Inf"),
    ],
)
def test_no_right_answer_is_an_error(call, error, message):
    with pytest.raises(error, match=message):
        call()
