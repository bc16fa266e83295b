from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError, lstsq, qr, solve_spd


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5), (1, 6), (6, 1), (3, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_qr(shape, dtype, scale):
    a = normal(*shape, dtype=dtype) * scale
    q, r = qr(a)
    eps, k, size = torch.finfo(q.dtype).eps, min(shape), float(a.double().norm()) or 1.0
    assert (q.shape, r.shape) == ((shape[0], k), (k, shape[1]))
    assert torch.allclose(q.double().T @ q.double(), torch.eye(k).double(), atol=20 * eps)
    assert torch.allclose(q.double() @ (r.double() / size), a.double() / size, atol=20 * eps)
    assert torch.equal(r, r.triu())
    assert (r.diagonal() >= 0).all()


def test_qr_of_deficient_and_batched():
    a = torch.stack([normal(6, 2) @ normal(2, 4, seed=1), torch.zeros(6, 4).double(), normal(6, 4) * 1e250])
    q, r = qr(a)
    assert torch.allclose(q.mT @ q, torch.eye(4).double().expand(3, 4, 4), atol=1e-14)
    assert torch.allclose(q @ r, a, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(20, 6), (6, 20), (8, 8)], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_lstsq_is_the_pseudoinverse(shape, rank, dtype):
    a = (normal(shape[0], rank) @ normal(rank, shape[1], seed=1)).to(dtype)
    b = normal(shape[0], 3, seed=2).to(dtype)
    rcond = max(shape) * torch.finfo(dtype).eps
    truth = np.linalg.pinv(a.double().numpy(), rcond=rcond) @ b.double().numpy()
    x = lstsq(a, b)
    assert x.dtype == dtype
    assert np.allclose(x.double().numpy(), truth, rtol=1e-9 if dtype == torch.float64 else 1e-6, atol=1e-6 * rank)


@pytest.mark.parametrize(("a_scale", "b_scale"), [(1e200, 1.0), (1e-200, 1e90), (1.0, 1e-250), (1e30, 1e30)])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_lstsq_does_not_depend_on_scale(a_scale, b_scale, ridge):
    a, b = normal(12, 5), normal(12, 2, seed=1)
    x = lstsq(a, b, ridge=ridge)
    assert torch.allclose(lstsq(a * a_scale, b * b_scale, ridge=ridge) * (a_scale / b_scale), x, rtol=1e-12)


def test_lstsq_ridge_is_the_augmented_system():
    a, b = normal(12, 5), normal(12, 2, seed=1)
    penalty = 0.3 * float((a.T @ a).diagonal().mean())
    augmented = np.vstack([a.numpy(), np.sqrt(penalty) * np.eye(5)])
    truth = np.linalg.lstsq(augmented, np.vstack([b.numpy(), np.zeros((5, 2))]), rcond=None)[0]
    assert np.allclose(lstsq(a, b, ridge=0.3).numpy(), truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=str)
def test_lstsq_of_nothing_is_zero(shape):
    x = lstsq(torch.zeros(shape), torch.ones(shape[0], 2))
    assert torch.equal(x, torch.zeros(shape[1], 2))
    assert torch.equal(lstsq(torch.zeros(4, 3), torch.ones(4, 2), ridge=1.0), torch.zeros(3, 2))


def test_lstsq_batch():
    a, b = normal(3, 7, 4), normal(3, 7, 2, seed=1)
    a[1, :, 2] = a[1, :, 0]
    for i in range(3):
        assert torch.allclose(lstsq(a, b)[i], lstsq(a[i], b[i]), atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_solve_spd_of_a_regular_system(dtype, ridge):
    x = normal(30, 8).to(dtype)
    gram, rhs = x.T @ x, normal(8, 3, seed=1).to(dtype)
    dense = gram.double().numpy()
    truth = np.linalg.solve(dense + ridge * dense.diagonal().mean() * np.eye(8), rhs.double().numpy())
    result = solve_spd(gram, rhs, ridge=ridge)
    assert result.dtype == dtype
    assert np.allclose(result.double().numpy(), truth, rtol=1e-11 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_solve_spd_of_a_singular_system_has_smallest_norm(rank, dtype, scale, known_gram):
    gram = (known_gram(8, [*np.linspace(1, 2, rank), *np.zeros(8 - rank)]) * scale).to(dtype)
    rhs = normal(8, 3, seed=1).to(dtype)
    truth = np.linalg.pinv(gram.double().numpy() / scale, rcond=8 * torch.finfo(dtype).eps) @ rhs.double().numpy()
    assert np.allclose(
        solve_spd(gram, rhs).double().numpy() * scale, truth, atol=1e-5 if dtype != torch.float64 else 1e-12
    )


def test_solve_spd_of_zero_and_nothing():
    assert torch.equal(solve_spd(torch.zeros(3, 3), torch.ones(3, 2)), torch.zeros(3, 2))
    assert torch.equal(solve_spd(torch.zeros(3, 3), torch.ones(3, 2), ridge=0.1), torch.zeros(3, 2))
    assert solve_spd(torch.zeros(0, 0), torch.ones(0, 2)).shape == (0, 2)


def test_solve_spd_batch(known_gram):
    grams = torch.stack([known_gram(5, [5, 4, 3, 2, 1]), known_gram(5, [5, 4, 3, 0, 0], 1), torch.zeros(5, 5).double()])
    rhs = normal(3, 5, 2)
    for i in range(3):
        assert torch.allclose(solve_spd(grams, rhs)[i], solve_spd(grams[i], rhs[i]), atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 12), rows=st.integers(1, 20), exponent=st.integers(-12, 12), seed=st.integers(0, 999))
def test_solve_spd_solves_every_normal_equation(n, rows, exponent, seed):
    x = normal(rows, n, seed=seed) * 10.0**exponent
    y = normal(rows, 2, seed=seed + 1)
    solution = solve_spd(x.T @ x, x.T @ y)
    # A minimiser of ||x w - y|| leaves a residual orthogonal to the columns of x. The Gram squares the condition
    # number, so directions below 1e-8 of s_1 are lost and with them at most 1e-7 of the right-hand side.
    assert (x.T @ (y - x @ solution)).norm() <= 1e-6 * x.norm() * y.norm()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lstsq(torch.ones(3, 2), torch.ones(2, 2)), r"does not fit a of shape \(3, 2\)"),
        (lambda: lstsq(torch.ones(3, 2), torch.ones(3)), "does not fit"),
        (lambda: lstsq(torch.ones(3, 2), torch.full((3, 1), float("nan"))), "right-hand side: .*NaN"),
        (lambda: solve_spd(torch.ones(3, 2), torch.ones(3, 1)), "gram: .*is not square"),
        (lambda: solve_spd(torch.eye(3), torch.ones(2, 1)), "does not fit gram"),
        (lambda: solve_spd(torch.diag(torch.tensor([1.0, -1.0])), torch.ones(2, 1)), "not positive semidefinite"),
        (lambda: solve_spd(-torch.eye(2), torch.ones(2, 1)), "not positive semidefinite"),
        (lambda: qr(torch.tensor([[float("inf")]])), "contains NaN or Inf"),
        (lambda: solve_spd(torch.eye(2) * 1e-30, torch.ones(2, 1) * 1e30), "x: .*pass the input as float64"),
    ],
)
def test_no_right_answer_is_an_error(call, message):
    with pytest.raises(LinalgError, match=message):
        call()


@pytest.mark.parametrize("function", [lstsq, solve_spd])
@pytest.mark.parametrize("ridge", [-1.0, float("nan"), float("inf")])
def test_bad_ridge(function, ridge):
    with pytest.raises(ValueError, match="ridge must be a number of at least 0"):
        function(torch.eye(2), torch.ones(2, 1), ridge=ridge)
