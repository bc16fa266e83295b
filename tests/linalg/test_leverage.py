"""Leverage scores against explicit projections, and the column-row product against its mean, variance and error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError
from eckart.linalg.leverage import column_row_product, leverage_scores, ridge_leverage_scores


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hat(a, penalty):
    """diag(a (aᵀa + penalty I)⁻¹ aᵀ) in the plainest way."""
    return (a @ torch.linalg.inv(a.T @ a + penalty * torch.eye(a.shape[1]).double()) @ a.T).diagonal()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_scores_are_the_diagonal_of_the_hat_matrix(dtype, scale, ridge):
    a = normal(40, 7).to(dtype)
    truth = hat(a.double(), ridge * float((a.double().T @ a.double()).diagonal().mean()))
    scores = leverage_scores((a.double() * scale).to(dtype), ridge=ridge)
    assert scores.dtype == torch.float64
    # Scaling by 1e30 rounds in bfloat16: one more relative rounding of each entry.
    rounding = 1e-2 if dtype == torch.bfloat16 and scale != 1 else 1e-5 if dtype != torch.float64 else 1e-12
    assert torch.allclose(scores, truth, atol=rounding)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_scores_sum_to_the_rank(rank):
    a = normal(30, 6) @ normal(6, 20, seed=1)
    assert float(leverage_scores(a, rank).sum()) == pytest.approx(rank, abs=1e-12)
    assert float(leverage_scores(a).sum()) == pytest.approx(6, abs=1e-12)
    assert float(leverage_scores(a.float()).sum()) == pytest.approx(6, abs=1e-5)
    u = torch.linalg.svd(a)[0][:, :rank]
    assert torch.allclose(leverage_scores(a, rank), u.square().sum(1), atol=1e-10)


def test_small_singular_values_count(known):
    assert float(leverage_scores(known(20, 8, [1, 1e-5, 1e-10])).sum()) == pytest.approx(3)
    assert float(leverage_scores(known(20, 8, [1, 1e-5, 1e-10]).float()).sum()) == pytest.approx(2, abs=1e-3)


def test_scores_of_a_gram_are_those_of_its_factor():
    x = normal(50, 9)
    gram = x.T @ x
    for ridge in (1e-9, 1e-7, 1e-4, 0.1, 10.0):
        penalty = ridge * float(gram.diagonal().mean())
        scores = ridge_leverage_scores(gram, ridge)
        # MoDeGPT's form: 1 - λ [(C + λ I)⁻¹]_ii.
        inverse = torch.linalg.inv(gram + penalty * torch.eye(9).double())
        assert torch.allclose(scores, (gram @ inverse).diagonal(), atol=1e-10)
        assert torch.allclose(scores, 1 - penalty * inverse.diagonal(), atol=1e-10)
        of_columns = leverage_scores(x.T, ridge=penalty / float((x @ x.T).diagonal().mean()))
        assert torch.allclose(scores, of_columns, atol=1e-10)


def test_smallest_inverse_diagonal_is_the_largest_score():
    """MoDeGPT keeps the k smallest diagonals of (C + λ I)⁻¹."""
    x = normal(80, 20) * torch.linspace(0.1, 3, 20)
    gram = x.T @ x
    order = ridge_leverage_scores(gram, 0.5).argsort(descending=True)
    penalty = 0.5 * gram.diagonal().mean()
    inverse = torch.linalg.inv(gram + penalty * torch.eye(20).double())
    assert torch.equal(order, inverse.diagonal().argsort())


@pytest.mark.parametrize("ridge", [0.0, 1e-8, 1e-3, 1.0])
def test_scores_of_a_deficient_gram(ridge, known_gram):
    gram = known_gram(12, [3, 2, 1, *[0] * 9])
    scores = ridge_leverage_scores(gram, ridge)
    penalty = ridge * 6 / 12
    assert float(scores.sum()) == pytest.approx(sum(v / (v + penalty) for v in (3, 2, 1)), abs=1e-6)
    assert torch.equal(ridge_leverage_scores(torch.zeros(4, 4), ridge), torch.zeros(4).double())
    assert ridge_leverage_scores(torch.zeros(0, 0), ridge).shape == (0,)


def test_sum_is_bounded_by_the_ridge():
    gram = normal(30, 100) @ normal(30, 100).T
    for k in (1, 5, 20):
        assert ridge_leverage_scores(gram, 30 / k).sum() <= k


def test_scores_of_a_batch():
    a = torch.stack([normal(9, 4), normal(9, 2) @ normal(2, 4), torch.zeros(9, 4).double()])
    gram = a.mT @ a
    for i in range(3):
        assert torch.allclose(leverage_scores(a)[i], leverage_scores(a[i]), atol=1e-14)
        assert torch.allclose(leverage_scores(a, ridge=0.1)[i], leverage_scores(a[i], ridge=0.1), atol=1e-14)
        assert torch.allclose(ridge_leverage_scores(gram, 0.1)[i], ridge_leverage_scores(gram[i], 0.1), atol=1e-14)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    ridge=st.sampled_from([0.0, 1e-9, 1e-3, 10.0]),
    decimals=st.integers(0, 6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
    seed=st.integers(0, 999),
)
def test_scores_of_any_matrix(m, n, ridge, decimals, dtype, seed):
    a = normal(m, n, seed=seed).round(decimals=decimals).to(dtype)
    scores = leverage_scores(a, ridge=ridge)
    assert scores.shape == (m,)
    assert ((scores >= 0) & (scores <= 1)).all()
    s = torch.linalg.svdvals(a.double())
    wanted = s > max(m, n) * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * s[0]
    penalty = ridge * s.square().sum() / n
    dimension = (s[wanted].square() / (s[wanted].square() + penalty)).sum()
    assert float(scores.sum()) == pytest.approx(float(dimension), abs=1e-4)
    of_gram = ridge_leverage_scores(a.double().T @ a.double(), ridge)
    assert of_gram.shape == (n,)
    assert ((of_gram >= 0) & (of_gram <= 1)).all()


# The column-row product.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e15, 1e-15])
@pytest.mark.parametrize("select", ["norm", "top"])
@pytest.mark.parametrize("shape", [(9, 12, 8), (60, 4, 50)], ids=str)
def test_product_error_is_the_true_one(dtype, scale, select, shape):
    m, p, n = shape
    a, b = (normal(m, p) * scale).to(dtype), (normal(p, n, seed=1) * scale).to(dtype)
    result = column_row_product(a, b, 3, select=select)
    assert result.left.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    true = float((a.double() @ b.double() - result.left.double() @ result.right.double()).norm())
    assert float(result.error) == pytest.approx(true, rel=1e-5)
    assert torch.equal(result.indices, result.indices.sort().values)
    assert torch.allclose(result.scores, a.double().norm(dim=0) * b.double().norm(dim=1), rtol=1e-6)


def test_top_keeps_the_largest():
    a, b = normal(20, 10), normal(10, 30, seed=1)
    result = column_row_product(a, b, 4, select="top")
    scores = a.norm(dim=0) * b.norm(dim=1)
    best = scores.argsort(descending=True)[:4].sort().values
    assert torch.equal(result.indices, best)
    assert torch.equal(result.left, a[:, best])
    assert torch.equal(result.right, b[best])
    dropped = scores.sum() - scores[best].sum()
    assert result.error <= dropped
    everything = column_row_product(a, b, 99, select="top")
    assert float(everything.error) == 0
    assert torch.allclose(everything.reconstruct(), a @ b, atol=1e-13)


def test_scores_need_no_root_of_the_gram():
    """MoDeGPT scores by the column norms of C_q^(1/2) and C_k^(1/2): the same numbers as the norms of q and k."""
    q, k = normal(50, 6), normal(50, 6, seed=1)
    scores = column_row_product(q, k.T, 2, select="top").scores
    assert torch.allclose(scores, ((q.T @ q).diagonal() * (k.T @ k).diagonal()).sqrt(), rtol=1e-12)


def test_norm_is_unbiased_with_the_stated_variance():
    a, b = normal(4, 6) * torch.linspace(0.2, 2, 6), normal(6, 5, seed=1)
    product, draws, rank = a @ b, 4000, 3
    scores = a.norm(dim=0) * b.norm(dim=1)
    generator = torch.Generator().manual_seed(0)
    batch = column_row_product(a.expand(draws, 4, 6), b.expand(draws, 6, 5), rank, generator=generator)
    deviation = batch.reconstruct() - product
    variance = float(scores.sum().square() - product.square().sum()) / rank
    assert float(deviation.square().sum((1, 2)).mean()) == pytest.approx(variance, rel=0.1)
    # The mean of 4000 draws is off by the root of variance / 4000; four of those is far out.
    assert float(deviation.mean(0).norm()) <= 4 * (variance / draws) ** 0.5
    assert torch.allclose(batch.error, deviation.norm(dim=(1, 2)), rtol=1e-6, atol=1e-6)


def test_more_draws_than_terms():
    result = column_row_product(normal(4, 2), normal(2, 5), 500)
    assert result.left.shape == (4, 500)
    assert result.error <= 0.2 * (normal(4, 2) @ normal(2, 5)).norm()


@pytest.mark.parametrize("select", ["norm", "top"])
def test_product_of_a_batch_and_of_zeros(select):
    a, b = torch.stack([normal(4, 6), torch.zeros(4, 6).double()]), normal(2, 6, 5, seed=1)
    result = column_row_product(a, b, 3, select=select)
    assert result.left.shape == (2, 4, 3)
    assert result.right.shape == (2, 3, 5)
    assert result.left.isfinite().all()
    assert torch.equal(result.reconstruct()[1], torch.zeros(4, 5).double())
    assert float(result.error[1]) == 0
    if select == "top":
        assert torch.equal(result.left[0], column_row_product(a[0], b[0], 3, select=select).left)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 9),
    p=st.integers(1, 9),
    n=st.integers(1, 9),
    rank=st.integers(1, 12),
    select=st.sampled_from(["norm", "top"]),
    decimals=st.integers(0, 6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
    seed=st.integers(0, 999),
)
def test_product_of_any_matrices(m, p, n, rank, select, decimals, dtype, seed):
    a = normal(m, p, seed=seed).round(decimals=decimals).to(dtype)
    b = normal(p, n, seed=seed + 1).round(decimals=decimals).to(dtype)
    result = column_row_product(a, b, rank, select=select)
    true = float((a.double() @ b.double() - result.left.double() @ result.right.double()).norm())
    assert float(result.error) == pytest.approx(true, rel=1e-4, abs=1e-5)


def test_results_repeat_and_inputs_are_untouched():
    a, b = normal(5, 8).requires_grad_(), normal(8, 4, seed=1)
    before, state = a.detach().clone(), torch.get_rng_state()
    first, second = column_row_product(a, b, 3), column_row_product(a, b, 3)
    assert torch.equal(first.left, second.left)
    assert not first.left.requires_grad
    assert not leverage_scores(a).requires_grad
    assert torch.equal(a.detach(), before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: leverage_scores(normal(3, 2), 0), ValueError, "rank must be at least 1"),
        (lambda: leverage_scores(normal(3, 2), ridge=-1), ValueError, "ridge must be a number of at least 0"),
        (lambda: leverage_scores(normal(3, 2).log()), LinalgError, "a: .*NaN or Inf"),
        (lambda: ridge_leverage_scores(torch.eye(2), float("nan")), ValueError, "ridge must be a number"),
        (lambda: ridge_leverage_scores(normal(3, 2), 1.0), LinalgError, "gram: .*is not square"),
        (lambda: ridge_leverage_scores(normal(3, 3), 1.0), LinalgError, "gram: .*is not symmetric"),
        (lambda: ridge_leverage_scores(-torch.eye(2), 0.1), LinalgError, "not positive semidefinite"),
        (lambda: ridge_leverage_scores(torch.diag(torch.tensor([1.0, -1.0])), 0.0), LinalgError, "not positive semi"),
        (lambda: column_row_product(normal(3, 2), normal(2, 2), 0), ValueError, "rank must be at least 1"),
        (lambda: column_row_product(normal(3, 2), normal(2, 2), 1, select="x"), ValueError, "one of norm, top"),
        (lambda: column_row_product(normal(3, 2), normal(3, 2), 1), LinalgError, r"b: .*does not fit a of shape"),
        (lambda: column_row_product(normal(3, 2), normal(1, 2, 2), 1), LinalgError, "the same batch"),
        (lambda: column_row_product(normal(3, 2), normal(2, 2).log(), 1), LinalgError, "b: .*NaN or Inf"),
    ],
)
def test_no_right_answer_is_an_error(call, error, message):
    with pytest.raises(error, match=message):
        call()
