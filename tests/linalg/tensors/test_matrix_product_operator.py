"""matrix_product_operator: the dense matrix, multiplied out site by site in the test, is the truth."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError, svd
from eckart.linalg.tensors.kronecker import kronecker_svd
from eckart.linalg.tensors.matrix_product_operator import MatrixProductOperator, matrix_product_operator


def dense(operator: MatrixProductOperator) -> torch.Tensor:
    """Entry by entry: the trace of a product of matrices."""
    rows = [core.shape[1] for core in operator.cores]
    columns = [core.shape[2] for core in operator.cores]
    entries = []
    for o in itertools.product(*map(range, rows)):
        for i in itertools.product(*map(range, columns)):
            product = torch.eye(operator.cores[0].shape[0], dtype=operator.cores[0].dtype)
            for core, p, q in zip(operator.cores, o, i, strict=True):
                product = product @ core[:, p, q]
            entries.append(product.trace())
    return torch.stack(entries).reshape(math.prod(rows), math.prod(columns))


@pytest.mark.parametrize("ranks", [1, (2, 3), None])
def test_matrix_is_that_of_the_cores(ranks, gaussian, distance):
    a = gaussian(12, 30)
    result = matrix_product_operator(a, (2, 3, 2), (3, 2, 5), ranks)
    assert result.shape == (12, 30)
    assert [core.shape[1:3] for core in result.cores] == [(2, 3), (3, 2), (2, 5)]
    assert torch.allclose(result.reconstruct(), dense(result))
    assert float(result.error) == pytest.approx(distance(a, result.reconstruct()), abs=1e-12)
    assert result.parameters == sum(core.numel() for core in result.cores)
    for core in result.cores[:-1]:
        flat = core.flatten(0, 2)
        assert torch.allclose(flat.T @ flat, torch.eye(core.shape[3]).double(), atol=1e-12)
    if ranks is None:
        assert result.ranks == (6, 10)
        assert float(result.error) < 1e-12


def test_parameters_of_a_published_example(gaussian):
    # 216 x 216 with three sites of 6 x 6 and bond dimension 5: 2 * 36 * 5 + 36 * 25
    assert matrix_product_operator(gaussian(216, 216), (6, 6, 6), (6, 6, 6), 5).parameters == 1260


def test_one_site_is_the_matrix(gaussian):
    a = gaussian(4, 5)
    assert torch.allclose(matrix_product_operator(a, (4,), (5,)).cores[0][0, ..., 0], a)


def test_two_sites_are_a_kronecker_svd(gaussian):
    a = gaussian(12, 20)
    operator, terms = matrix_product_operator(a, (3, 4), (4, 5), 3), kronecker_svd(a, 3, (3, 4))
    assert torch.allclose(operator.reconstruct(), terms.reconstruct())
    assert float(operator.error) == pytest.approx(float(terms.error))


def test_sites_of_one_row_and_one_column_are_low_rank(gaussian):
    a = gaussian(12, 20)
    assert torch.allclose(matrix_product_operator(a, (12, 1), (1, 20), 3).reconstruct(), svd(a, 3).reconstruct())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_apply_is_the_product(dtype, gaussian):
    a = gaussian(12, 30).to(dtype)
    result = matrix_product_operator(a, (2, 3, 2), (3, 2, 5))
    for x in (gaussian(30), gaussian(7, 30), gaussian(2, 3, 30), gaussian(0, 30), gaussian(30, 4).T):
        y = result.apply(x)
        assert y.shape == (*x.shape[:-1], 12)
        assert y.dtype == dtype
        # inner products of length 30
        assert torch.allclose(y, x.to(dtype) @ a.T, atol=100 * torch.finfo(dtype).eps * 30)


def test_apply_never_forms_the_matrix():
    core = torch.ones(1, 32, 32, 1)
    operator = MatrixProductOperator((core,) * 4, torch.zeros(()))  # 2^20 squared: 4 terabytes
    assert operator.shape == (1 << 20, 1 << 20)
    assert float(operator.apply(torch.ones(1 << 20))[5]) == 1 << 20


def test_rings_are_closed_by_the_trace(gaussian):
    cores = tuple(gaussian(3, m, n, 3, seed=m) for m, n in ((2, 3), (4, 2), (3, 1)))
    ring = MatrixProductOperator(cores, torch.zeros(()))
    x = gaussian(5, 6)
    assert torch.allclose(ring.reconstruct(), dense(ring))
    assert torch.allclose(ring.apply(x), x @ dense(ring).T)
    with pytest.raises(ValueError, match="joined by a bond of 3"):
        ring.round(2)


def test_identity_ring():
    # every slice I / R makes the identity, whatever R
    cores = tuple(torch.eye(n)[None, :, :, None].expand(3, n, n, 3) / 3 for n in (2, 3, 4))
    ring = MatrixProductOperator(cores, torch.zeros(()))
    assert torch.allclose(ring.reconstruct(), torch.eye(24), atol=1e-6)
    assert torch.allclose(ring.apply(torch.eye(24)), torch.eye(24), atol=1e-6)


def test_rounding_is_decomposing_again(gaussian):
    a = gaussian(12, 30)
    rounded = matrix_product_operator(a, (2, 3, 2), (3, 2, 5)).round((2, 3))
    again = matrix_product_operator(a, (2, 3, 2), (3, 2, 5), (2, 3))
    assert rounded.ranks == again.ranks == (2, 3)
    assert torch.allclose(rounded.reconstruct(), again.reconstruct())
    assert float(rounded.error) == pytest.approx(float(again.error))


def test_gradients(gaussian):
    operator = matrix_product_operator(gaussian(6, 6), (2, 3), (3, 2), 2)
    core, x = operator.cores[0].clone().requires_grad_(), gaussian(4, 6).requires_grad_()
    trained = operator._replace(cores=(core, operator.cores[1]))
    by_apply = torch.autograd.grad(trained.apply(x).square().sum(), [core, x])
    by_matrix = torch.autograd.grad((x @ trained.reconstruct().T).square().sum(), [core, x])
    assert all(torch.allclose(one, other) for one, other in zip(by_apply, by_matrix, strict=True))


@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_extreme_scale(factor, gaussian):
    a = gaussian(12, 30).float()
    plain = matrix_product_operator(a, (3, 4), (5, 6), 4)
    scaled = matrix_product_operator(a * factor, (3, 4), (5, 6), 4)
    assert torch.allclose(scaled.reconstruct().double() / factor, plain.reconstruct().double(), atol=1e-5)
    assert float(scaled.error) / factor == pytest.approx(float(plain.error), rel=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: matrix_product_operator(a, (2, 5), (5, 2)), LinalgError, r"12 rows are not the product of \(2, 5\)"),
        (lambda a: matrix_product_operator(a, (3, 4), (5, 1)), LinalgError, "10 columns are not the product"),
        (lambda a: matrix_product_operator(a, (-3, -4), (5, 2)), LinalgError, "12 rows are not the product"),
        (lambda a: matrix_product_operator(a[None], (3, 4), (5, 2)), LinalgError, "is not one matrix"),
        (lambda a: matrix_product_operator(a / 0, (3, 4), (5, 2)), LinalgError, r"a: shape \(12, 10\).*NaN or Inf"),
        (lambda a: matrix_product_operator(a, (3, 4), (10,)), ValueError, "2 factors and column_shape 1"),
        (lambda a: matrix_product_operator(a, (), ()), ValueError, "0 factors"),
        (lambda a: matrix_product_operator(a, (3, 4), (5, 2), (2, 2)), ValueError, "ranks has 2 entries; give 1"),
        (lambda a: matrix_product_operator(a, (3, 4), (5, 2), 0), ValueError, "ranks must be at least 1"),
        (lambda a: matrix_product_operator(a, (3, 4), (5, 2), tol=-1), ValueError, "tol must be positive"),
        (lambda a: matrix_product_operator(a, (3, 4), (5, 2)).apply(a.T), LinalgError, "matrix of 10 columns"),
    ],
)
def test_what_cannot_be_done_is_said(call, error, message, gaussian):
    with pytest.raises(error, match=message):
        call(gaussian(12, 10))


@settings(max_examples=25, deadline=None)
@given(
    sites=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
    tol=st.one_of(st.none(), st.sampled_from([0.5, 0.1])),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_laws_for_any_matrix(sites, tol, dtype, seed, gaussian, distance):
    rows, columns = zip(*sites, strict=True)
    a = gaussian(math.prod(rows), math.prod(columns), seed=seed).to(dtype)
    result = matrix_product_operator(a, rows, columns, tol=tol)
    eps = torch.finfo(result.cores[0].dtype).eps
    size = float(a.double().norm())
    made = distance(a, result.reconstruct())
    assert made <= (tol or 0) * size + 50 * eps * size
    assert float(result.error) == pytest.approx(made, rel=1e-3, abs=50 * eps * size)
    x = gaussian(3, a.shape[1], seed=seed + 1).to(result.cores[0].dtype)
    assert torch.allclose(result.apply(x), x @ result.reconstruct().T, atol=1e3 * eps * max(1, size))
