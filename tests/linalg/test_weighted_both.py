"""The oracle whitens with dense square roots and pseudo-inverses in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError, svd, weighted_svd
from eckart.linalg.weighted_both import row_column_weighted_svd

SHAPES = [(6, 9), (9, 6), (7, 7), (1, 5), (5, 1)]
KINDS = ["none", "diagonal", "gram", "diagonal with zeros", "deficient gram"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight(kind, size, seed=0):
    x = normal(max(1, size - 2) if kind == "deficient gram" else size + 20, size, seed=seed)
    diagonal = x.square().sum(0)
    if kind == "diagonal with zeros":
        diagonal[::2] = 0
    return {"none": None, "gram": x.T @ x, "deficient gram": x.T @ x}.get(kind, diagonal)


def dense(given, size):
    if given is None:
        return torch.eye(size, dtype=torch.float64)
    return given.double().diag() if given.ndim == 1 else given.double()


def root(given, size):
    """The symmetric square root, and its pseudo-inverse."""
    values, vectors = np.linalg.eigh(dense(given, size).numpy())
    values = np.where(values > 1e-12 * values.max(initial=0), values, 0)
    inverse = np.divide(1, np.sqrt(values), out=np.zeros_like(values), where=values > 0)
    return (vectors * np.sqrt(values)) @ vectors.T, (vectors * inverse) @ vectors.T


@pytest.mark.parametrize("column_kind", KINDS)
@pytest.mark.parametrize("row_kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_dense_whitening(shape, row_kind, column_kind):
    a, (m, n) = normal(*shape), shape
    row, column = weight(row_kind, m, 1), weight(column_kind, n, 2)
    (p, p_inverse), (q, q_inverse) = root(row, m), root(column, n)
    u, s, vh = np.linalg.svd(p @ a.numpy() @ q, full_matrices=False)
    for k in range(1, min(shape) + 1):
        result = row_column_weighted_svd(a, row, column, k)
        truth = p_inverse @ (u[:, :k] * s[:k]) @ vh[:k] @ q_inverse
        # Weights of condition below 1e4; the pseudo-inverses carry its root.
        np.testing.assert_allclose(result.reconstruct(), truth, rtol=0, atol=1e-9)
        np.testing.assert_allclose(result.s, s[:k], rtol=0, atol=1e-12 * s[0])
        error = np.linalg.norm(p @ (a.numpy() - result.reconstruct().numpy()) @ q)
        assert float(result.error) == pytest.approx(error, rel=1e-8, abs=1e-10 * s[0])
        assert float(result.error) == pytest.approx(np.linalg.norm(s[k:]), rel=1e-8, abs=1e-12 * s[0])
        balance = result.left.T @ dense(row, m) @ result.left, result.right @ dense(column, n) @ result.right.T
        for side in balance:
            np.testing.assert_allclose(side, np.diag(s[:k]), rtol=0, atol=1e-10 * s[0])


def test_zero_weights_leave_zeros():
    a = normal(4, 5)
    row, column = torch.tensor([1.0, 0.0, 2.0, 1.0]), torch.tensor([1.0, 3.0, 1.0, 0.0, 0.0])
    changed = a.clone()
    changed[1], changed[:, 3:] = 1e6, -1e6
    b, other = (row_column_weighted_svd(x, row, column, 2).reconstruct() for x in (a, changed))
    torch.testing.assert_close(b, other, rtol=0, atol=1e-12)
    assert not bool(b[1].any())
    assert not bool(b[:, 3:].any())
    nothing = row_column_weighted_svd(a, torch.zeros(4), None, 2)
    assert not bool(nothing.reconstruct().any())
    assert float(nothing.error) == 0


def test_without_weights_it_is_the_svd_and_with_one_the_weighted_svd():
    a, gram = normal(8, 6), weight("gram", 6)
    reference = svd(a, 3)
    result = row_column_weighted_svd(a, rank=3)
    torch.testing.assert_close(result.reconstruct(), reference.reconstruct(), rtol=0, atol=1e-13)
    torch.testing.assert_close(result.error, reference.error)
    basis = weighted_svd(a, gram, 3).basis
    # ``weighted_svd`` goes through the Gram matrix, which squares the condition number.
    torch.testing.assert_close(
        row_column_weighted_svd(a, None, gram, 3).reconstruct(), basis @ (basis.T @ a), rtol=0, atol=1e-8
    )
    torch.testing.assert_close(row_column_weighted_svd(a, None, gram).reconstruct(), a, rtol=0, atol=1e-12)
    transposed = row_column_weighted_svd(a.T, gram, None, 3)
    torch.testing.assert_close(transposed.reconstruct().T, basis @ (basis.T @ a), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("a_scale", "r_scale", "c_scale"), [(1e30, 1e-30, 1e-30), (1e-30, 1e30, 1e30), (1, 1e-30, 1e30)]
)
def test_scale_and_dtype(dtype, a_scale, r_scale, c_scale):
    a, row, column = normal(7, 6), weight("gram", 7, 1), weight("diagonal", 6, 2)
    reference = row_column_weighted_svd(a, row, column, 3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    result = row_column_weighted_svd((a * a_scale).to(dtype), (row * r_scale).to(wide), (column * c_scale).to(wide), 3)
    assert result.left.dtype == result.right.dtype == result.s.dtype == wide
    assert result.error.dtype == torch.float64
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    b = result.left.double() @ result.right.double() / a_scale
    torch.testing.assert_close(b, reference.reconstruct(), rtol=0, atol=tolerance)
    assert float(result.error) / (a_scale * (r_scale * c_scale) ** 0.5) == pytest.approx(
        float(reference.error), rel=max(tolerance, 1e-6)
    )


def test_singular_values_beyond_float32():
    a, row = torch.full((2, 2), 1e30), torch.full((2,), 1e30)
    with pytest.raises(LinalgError, match=r"singular values: .*overflows.*pass the input as float64"):
        row_column_weighted_svd(a, row, row)
    result = row_column_weighted_svd(a.double(), row, row)
    assert float(result.s[0]) == pytest.approx(2e60)
    torch.testing.assert_close(result.reconstruct(), a.double(), rtol=1e-6, atol=0)


def test_batch_and_inputs_unchanged():
    a, row, column = normal(2, 3, 5, 7).mT.contiguous().mT, normal(2, 3, 5).abs(), normal(2, 3, 20, 7, seed=1)
    column = column.mT @ column
    copies = [x.clone() for x in (a, row, column)]
    result = row_column_weighted_svd(a, row, column, 2)
    for i in range(2):
        for j in range(3):
            one = row_column_weighted_svd(a[i, j], row[i, j], column[i, j], 2)
            torch.testing.assert_close(result.reconstruct()[i, j], one.reconstruct(), rtol=0, atol=1e-11)
            torch.testing.assert_close(result.error[i, j], one.error)
    assert all(torch.equal(x, copy) for x, copy in zip((a, row, column), copies, strict=True))


def test_drivers():
    a, row, column = normal(300, 280), normal(300).abs(), normal(280, seed=1).abs()
    exact = row_column_weighted_svd(a, row, column, 5)
    fast = row_column_weighted_svd(a, row, column, 5, driver="auto")
    assert float(exact.error) <= float(fast.error) <= 1.01 * float(exact.error)
    true = (row.sqrt()[:, None] * (a - fast.reconstruct()) * column.sqrt()).norm()
    assert float(fast.error) == pytest.approx(float(true), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 8),
    n=st.integers(1, 8),
    rank=st.integers(1, 8),
    row_kind=st.sampled_from(KINDS),
    column_kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_no_other_matrix_of_that_rank_is_nearer(m, n, rank, row_kind, column_kind, dtype, seed):
    a = normal(m, n, seed=seed)
    row, column = weight(row_kind, m, seed + 1), weight(column_kind, n, seed + 2)
    result = row_column_weighted_svd(a.to(dtype), row, column, rank)
    (p, _), (q, _) = (tuple(map(torch.from_numpy, root(w, size))) for w, size in ((row, m), (column, n)))
    b = result.reconstruct()
    rounding = 1e-9 if b.dtype == torch.float64 else 1e-5
    assert int(torch.linalg.matrix_rank(b, rtol=rounding)) <= min(rank, m, n)
    best = float((p @ (a - b) @ q).norm())
    for step in (0.01, 0.3, 1.0):
        left = result.left + step * normal(*result.left.shape, seed=seed + 3)
        right = result.right + step * normal(*result.right.shape, seed=seed + 4)
        assert float((p @ (a - left @ right) @ q).norm()) >= best * (1 - 1e-6) - 1e-5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.eye(2), None, None, 0), ValueError, "rank must be at least 1, not 0"),
        ((torch.ones(2, 3), torch.ones(3)), LinalgError, r"row_weight: shape \(3,\).*give shape \(2,\) or \(2, 2\)"),
        ((torch.ones(2, 3), None, torch.ones(2, 3)), LinalgError, r"column_weight: .*matrix with 3 of them"),
        ((torch.ones(4, 2, 3), torch.ones(2)), LinalgError, r"give shape \(4, 2\) or \(4, 2, 2\)"),
        ((torch.ones(2, 3), torch.tensor([1.0, -1.0])), LinalgError, "row_weight: .*is negative"),
        ((torch.ones(2, 3), torch.tensor([[0.0, 1.0], [1.0, 0.0]])), LinalgError, "row_weight: .*is negative"),
        ((torch.ones(2, 3), -torch.ones(2)), LinalgError, "row_weight: .*is negative"),
        ((torch.ones(2, 3), torch.tensor([[1.0, 1.0], [0.0, 1.0]])), LinalgError, "row_weight: .*is not symmetric"),
        ((torch.ones(2, 3), torch.tensor([1.0, float("nan")])), LinalgError, "row_weight: .*NaN or Inf"),
        ((torch.tensor([[float("inf")]]),), LinalgError, "a: .*NaN or Inf"),
    ],
)
def test_what_has_no_answer_is_refused(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        row_column_weighted_svd(*arguments)
    assert "\n" not in str(caught.value)
