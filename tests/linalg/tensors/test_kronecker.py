"""kronecker_svd: the answer is the SVD of the rearrangement, which the tests make entry by entry."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError, svd
from eckart.linalg.tensors.kronecker import choose_kronecker_shape, kronecker_svd, rearrange
from eckart.linalg.tensors.shapes import kronecker_shapes

DTYPES = [torch.float32, torch.float64]


def rearranged(a: torch.Tensor, m1: int, n1: int) -> np.ndarray:
    """One row per block, by the definition."""
    m, n = a.shape
    m2, n2 = m // m1, n // n1
    blocks = itertools.product(range(m1), range(n1))
    return np.stack([a.double().numpy()[i * m2 : (i + 1) * m2, j * n2 : (j + 1) * n2].ravel() for i, j in blocks])


def check(a, rank, shape, distance, rounding=None, **options):
    result = kronecker_svd(a, rank, shape, **options)
    (m, n), (m1, n1) = a.shape, shape
    k = min(m1 * n1, m * n // (m1 * n1)) if rank is None else min(rank, m1 * n1, m * n // (m1 * n1))
    assert result.left.shape == (k, m1, n1)
    assert result.right.shape == (k, m // m1, n // n1)
    assert result.rank == k
    assert result.parameters == result.left.numel() + result.right.numel()
    s = np.linalg.svd(rearranged(a, m1, n1), compute_uv=False)
    best, size = np.sqrt((s[k:] ** 2).sum()), np.sqrt((s**2).sum())
    # a few roundings of every entry
    rounding = rounding or 50 * torch.finfo(result.s.dtype).eps
    made = distance(a, result.reconstruct())
    assert made <= best + rounding * size
    assert float(result.error) == pytest.approx(made, rel=1e-4, abs=rounding * size)
    assert result.error.dtype == torch.float64
    for factors in (result.left, result.right):
        flat = factors.double().flatten(1)
        assert torch.allclose(flat @ flat.T, torch.eye(k, dtype=torch.float64), atol=50 * rounding)
    by_hand = sum(w * torch.kron(u, v) for u, w, v in zip(result.left, result.s, result.right, strict=True))
    assert distance(by_hand, result.reconstruct()) <= rounding * size
    return result


def test_rearrangement_is_that_of_the_definition(gaussian):
    a = gaussian(6, 20)
    for shape in [(2, 5), (1, 1), (6, 20), (6, 1), (1, 20), (3, 4)]:
        assert np.array_equal(rearrange(a, shape).numpy(), rearranged(a, *shape))
    batch = gaussian(2, 3, 6, 20)
    assert torch.equal(rearrange(batch, (3, 4))[1, 2], rearrange(batch[1, 2], (3, 4)))


def test_rearrangement_undoes_itself_and_makes_outer_products(gaussian):
    u, v = gaussian(2, 3), gaussian(4, 5, seed=1)
    r = rearrange(torch.kron(u, v), (2, 3))
    assert torch.equal(r, torch.outer(u.flatten(), v.flatten()))
    assert torch.equal(rearrange(r, (2, 4)), torch.kron(u, v))
    assert torch.equal(rearrange(torch.arange(12).reshape(3, 4), (3, 2)).sort().values[0], torch.tensor([0, 1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2), (2, 6), (12, 1), (1, 18), (4, 9), (12, 18), (1, 1)], ids=str)
@pytest.mark.parametrize("rank", [1, 3, None])
def test_error_is_the_tail_of_the_rearrangement(shape, rank, dtype, gaussian, distance):
    check(gaussian(12, 18).to(dtype), rank, shape, distance)


@pytest.mark.parametrize("driver", ["exact", "gram", "randomized", "lanczos"])
def test_every_driver(driver, gaussian, distance):
    # the Gram of a float64 matrix is good to 1e-8, and so is a Lanczos or Krylov residual of 1e-6 (squared: 1e-12)
    check(gaussian(24, 20), 3, (4, 5), distance, rounding=1e-7, driver=driver, tol=1e-6)


def test_a_kronecker_product_is_found_up_to_sign_and_scale(gaussian):
    u, v = gaussian(3, 4), gaussian(5, 2, seed=1)
    result = kronecker_svd(torch.kron(u, v), 1, (3, 4))
    assert float(result.error) < 1e-13
    assert float(result.s[0]) == pytest.approx(float(u.norm() * v.norm()))
    cosines = [(result.left[0] * u).sum() / u.norm(), (result.right[0] * v).sum() / v.norm()]
    assert [abs(float(c)) for c in cosines] == pytest.approx([1, 1])
    assert float(cosines[0] * cosines[1]) > 0


def test_one_term_can_have_full_rank(gaussian):
    a = torch.kron(gaussian(4, 4), gaussian(5, 5, seed=1))
    assert np.linalg.matrix_rank(kronecker_svd(a, 1, (4, 4)).reconstruct().numpy()) == 20


def test_blocks_of_one_column_are_the_ordinary_svd(gaussian):
    a = gaussian(9, 7)
    result, plain = kronecker_svd(a, 3, (9, 1)), svd(a, 3)
    assert torch.allclose(result.s, plain.s)
    assert torch.allclose(result.reconstruct(), plain.reconstruct())


def test_terms_cost_what_low_rank_costs(gaussian):
    a = gaussian(64, 64)
    assert kronecker_svd(a, 3).parameters == 3 * (64 + 64)  # blocks 8 x 8


@pytest.mark.parametrize("shape", [(6, 2), (2, 10), (1, 5), (12, 1), (4, 20)], ids=str)
def test_apply_is_the_product(shape, gaussian):
    a = gaussian(12, 20)
    result = kronecker_svd(a, None, shape)
    for x in (gaussian(20), gaussian(7, 20), gaussian(2, 3, 20), gaussian(0, 20), gaussian(20, 7).T):
        y = result.apply(x)
        assert y.shape == (*x.shape[:-1], 12)
        assert torch.allclose(y, x @ a.T)
    assert result.apply(gaussian(3, 20).bfloat16()).dtype == torch.float64


def test_apply_never_forms_the_matrix(gaussian):
    n = 1 << 20  # the matrix would have 4 terabytes
    result = kronecker_svd(gaussian(4, 4), 2, (2, 2))._replace(
        left=torch.ones(2, 1024, 1024), s=torch.ones(2), right=torch.ones(2, 1024, 1024)
    )
    assert float(result.apply(torch.ones(1, n))[0, 0]) == 2 * n


def test_apply_and_reconstruct_have_gradients(gaussian):
    result = kronecker_svd(gaussian(6, 6), 2, (3, 2))
    left, x = result.left.clone().requires_grad_(), gaussian(4, 6).requires_grad_()
    trained = result._replace(left=left)
    by_apply = torch.autograd.grad(trained.apply(x).square().sum(), [left, x])
    by_matrix = torch.autograd.grad((x @ trained.reconstruct().T).square().sum(), [left, x])
    assert all(torch.allclose(one, other) for one, other in zip(by_apply, by_matrix, strict=True))


@pytest.mark.parametrize("driver", ["auto", "randomized"])
def test_a_batch_is_its_matrices(driver, gaussian):
    batch = gaussian(2, 3, 12, 10)
    result = kronecker_svd(batch, 2, (3, 5), driver=driver, tol=1e-8)
    x = gaussian(2, 3, 4, 10)
    assert result.left.shape == (2, 3, 2, 3, 5)
    assert result.reconstruct().shape == batch.shape
    assert torch.allclose(result.apply(x), x @ result.reconstruct().mT)
    for i, j in itertools.product(range(2), range(3)):
        one = kronecker_svd(batch[i, j], 2, (3, 5))
        assert torch.allclose(one.reconstruct(), result.reconstruct()[i, j], atol=1e-6)
        assert float(result.error[i, j]) == pytest.approx(float(one.error))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype, gaussian, distance):
    result = check(gaussian(12, 10).to(dtype), 4, (3, 5), distance)
    assert result.left.dtype == result.s.dtype == torch.float32


@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_scale_of_the_matrix_is_that_of_the_weights(factor, gaussian):
    a = gaussian(12, 10).float()
    plain, scaled = kronecker_svd(a, 3, (3, 2)), kronecker_svd(a * factor, 3, (3, 2))
    assert torch.allclose(scaled.s.double() / factor, plain.s.double())
    assert float(scaled.error) / factor == pytest.approx(float(plain.error), rel=1e-5)
    assert torch.allclose(scaled.left, plain.left, atol=1e-5)


def test_large_matrices_are_sampled_and_repeat(gaussian, tail):
    # exponential decay of the rearrangement's spectrum, 1024 x 1024 (blocks 32 x 32)
    q1, q2 = (torch.linalg.qr(gaussian(1024, 40, seed=seed).float())[0] for seed in (0, 1))
    a = rearrange((q1 * 0.8 ** torch.arange(40)) @ q2.T, (32, 32))
    first, second = kronecker_svd(a, 8), kronecker_svd(a, 8)
    assert torch.equal(first.left, second.left)
    best = float((0.8 ** torch.arange(8.0, 40.0)).norm())
    assert float(first.error) <= 1.01 * best
    other = kronecker_svd(a, 8, generator=torch.Generator().manual_seed(7))
    assert not torch.equal(first.left, other.left)


def test_degenerate_matrices(gaussian, distance):
    for a, shape in [
        (torch.zeros(6, 4), (3, 2)),
        (torch.ones(1, 6), (1, 3)),
        (torch.ones(6, 1), (2, 1)),
        (torch.tensor([[2.0]]), (1, 1)),
        (gaussian(4, 1) @ gaussian(1, 6), (2, 3)),
        (gaussian(10, 12).T[::2], (3, 5)),
    ]:
        check(a, 2, shape, distance)


def test_input_is_unchanged_and_detached(gaussian):
    a = gaussian(6, 6).requires_grad_()
    before = a.detach().clone()
    assert not kronecker_svd(a, 2, (2, 3)).left.requires_grad
    assert torch.equal(a.detach(), before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: kronecker_svd(a, 1, (5, 2)), LinalgError, r"its 12 rows do not divide by the 5 of shape \(5, 2\)"),
        (lambda a: kronecker_svd(a, 1, (3, 3)), LinalgError, "its 10 columns do not divide by the 3"),
        (lambda a: kronecker_svd(a, 1, (0, 2)), LinalgError, "do not divide by the 0"),
        (lambda a: kronecker_svd(a[0], 1, (1, 2)), LinalgError, "is not a matrix"),
        (lambda a: kronecker_svd(a / 0, 1, (3, 5)), LinalgError, r"\(12, 10\), dtype float64: contains NaN or Inf"),
        (lambda a: kronecker_svd(a.long(), 1, (3, 5)), LinalgError, r"\(12, 10\), dtype int64: is not real"),
        (lambda a: kronecker_svd(a, 0, (3, 5)), ValueError, "rank must be at least 1"),
        (lambda a: kronecker_svd(a, 1, (3, 5), driver="magic"), ValueError, "driver must be one of"),
        (lambda a: kronecker_svd(a[:7, :1], 1), ValueError, "a 7 x 1 matrix is a Kronecker product only with a number"),
        (lambda a: kronecker_svd(a, 1, (3, 5)).apply(a.T), LinalgError, "no rows for a matrix of 10 columns"),
        (lambda a: kronecker_svd(a[None], 1, (3, 5)).apply(a[0]), LinalgError, "no rows"),
        (lambda a: choose_kronecker_shape(a[None], 30), LinalgError, "is not one matrix"),
        (lambda a: choose_kronecker_shape(a, 30, shapes=[(5, 1)]), LinalgError, "do not divide"),
        (lambda a: choose_kronecker_shape(a, 30, shapes=[(3, 5), (0, 2)]), LinalgError, "do not divide by the 0"),
        (lambda a: choose_kronecker_shape(a, -9), ValueError, "parameters=-9 holds no term"),
        (lambda a: choose_kronecker_shape(a, 3), ValueError, "parameters=3 holds no term"),
        (lambda a: choose_kronecker_shape(a[:7, :1], 9), ValueError, "any shape"),
    ],
)
def test_what_cannot_be_done_is_said(call, error, message, gaussian):
    with pytest.raises(error, match=message):
        call(gaussian(12, 10))


@pytest.mark.parametrize("planted", [(2, 6), (4, 3), (2, 1), (1, 4)], ids=str)
def test_the_planted_shape_is_chosen(planted, gaussian):
    m1, n1 = planted
    a = torch.kron(gaussian(m1, n1), gaussian(8 // m1, 12 // n1, seed=1)) + 1e-3 * gaussian(8, 12, seed=2)
    choice = choose_kronecker_shape(a, m1 * n1 + 96 // (m1 * n1))
    assert choice.shape == planted
    assert choice.rank == 1
    assert choice.error == pytest.approx(float(kronecker_svd(a, 1, planted).error))


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 12), n=st.integers(2, 12), parameters=st.integers(8, 100), seed=st.integers(0, 9))
def test_no_other_shape_of_so_few_parameters_is_better(m, n, parameters, seed, gaussian):
    a = gaussian(m, n, seed=seed)
    tails = []
    for m1, n1 in kronecker_shapes(m, n):
        k = parameters // (m1 * n1 + m * n // (m1 * n1))
        if k:
            s = np.linalg.svd(rearranged(a, m1, n1), compute_uv=False)
            tails.append(np.sqrt((s[k:] ** 2).sum()))
    if not tails:
        with pytest.raises(ValueError, match="allow more"):
            choose_kronecker_shape(a, parameters)
        return
    choice = choose_kronecker_shape(a, parameters)
    assert kronecker_svd(a, choice.rank, choice.shape).parameters <= parameters
    assert choice.error == pytest.approx(min(tails), abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 4),
    rank=st.one_of(st.none(), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    decay=st.sampled_from([0.0, 0.5, 3.0]),
    seed=st.integers(0, 99),
)
def test_laws_for_any_shape(sizes, rank, dtype, decay, seed, gaussian, distance):
    m1, n1, m2, n2 = sizes
    a = gaussian(m1 * m2, n1 * n2, seed=seed)
    a = a * torch.exp(-decay * torch.arange(a.shape[1]))
    result = check(a.to(dtype), rank, (m1, n1), distance)
    x = gaussian(3, n1 * n2, seed=seed + 1).to(result.s.dtype)
    assert torch.allclose(result.apply(x), x @ result.reconstruct().T, atol=1e-4)
