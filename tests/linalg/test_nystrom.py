"""nystrom: a factor below the matrix in the order of semidefinite matrices, with the trace it says is left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError
from eckart.linalg.cur import skeleton
from eckart.linalg.nystrom import Nystrom, nystrom

SELECTIONS = ["random-pivot", "pivot", "leverage", "uniform", "gaussian"]
COLUMNS = SELECTIONS[:-1]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(n, seed=0):
    """Gaussian kernel of points in the plane."""
    x = normal(n, 2, seed=seed)
    return torch.exp(-torch.cdist(x, x).square() / 2)


def check(gram, result):
    """Order, errors and eigenpairs, in float64."""
    dense, factor = gram.double(), result.factor.double()
    trace, eps = float(dense.trace()), torch.finfo(result.factor.dtype).eps
    rounding = 100 * eps * trace
    left = dense - factor @ factor.T
    assert torch.linalg.eigvalsh(left)[0] >= -rounding
    assert abs(float(result.error - left.norm())) <= rounding
    assert abs(float(result.trace_error - left.trace())) <= rounding
    values, vectors = (part.double() for part in result.eigh())
    assert values.shape == (result.rank,)
    assert ((vectors * values) @ vectors.T - factor @ factor.T).norm() <= rounding
    assert (vectors.T @ vectors - torch.eye(result.rank).double()).norm() <= 100 * eps * max(1, result.rank)
    if result.indices is not None:
        assert len(set(result.indices.tolist())) == result.indices.numel() == result.rank
        # A column Nyström approximation has the chosen columns right.
        assert (left[:, result.indices]).norm() <= rounding


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_promises(select, dtype, scale, known_gram):
    for gram in (known_gram(60, np.exp(-np.arange(60) / 5)), kernel(60)):
        gram = (gram * scale).to(dtype)
        result = nystrom(gram, 12, select=select)
        assert result.factor.dtype == dtype
        assert result.rank == 12
        check(gram.double() / scale, _rescaled(result, scale))


def _rescaled(result, scale):
    factor = (result.factor.double() / scale**0.5).to(result.factor)
    return Nystrom(factor, result.indices, result.error / scale, result.trace_error / scale)


@pytest.mark.parametrize("select", COLUMNS)
def test_the_factor_is_that_of_the_chosen_columns(select):
    gram = kernel(50)
    result = nystrom(gram, 8, select=select)
    columns = gram[:, result.indices]
    truth = columns @ torch.linalg.pinv(gram[result.indices][:, result.indices], hermitian=True) @ columns.T
    # The pseudoinverse loses the condition number of the 8 x 8 block, below 1e6.
    assert torch.allclose(result.reconstruct(), truth, atol=1e-9)
    # The same for a matrix that need not be symmetric: its columns and rows around their intersection.
    assert torch.allclose(skeleton(gram, result.indices, result.indices).reconstruct(), truth, atol=1e-9)


def test_largest_pivots_are_those_of_pivoted_cholesky():
    gram = kernel(40)
    result = nystrom(gram, 10, select="pivot")
    left, pivots = gram.numpy().copy(), []
    for _ in range(10):
        pivot = int(left.diagonal().argmax())
        pivots.append(pivot)
        left -= np.outer(left[:, pivot], left[pivot]) / left[pivot, pivot]
    assert result.indices.tolist() == pivots
    assert float(result.trace_error) == pytest.approx(left.trace(), abs=1e-12)


def test_first_random_pivot_follows_the_diagonal():
    gram = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    generator = torch.Generator().manual_seed(0)
    drawn = [int(nystrom(gram, 1, generator=generator).indices) for _ in range(1000)]
    counts = np.bincount(drawn, minlength=4)
    # Three standard deviations of a binomial of 1000 draws are below 50.
    assert np.abs(counts - np.array([100, 200, 300, 400])).max() < 50


@pytest.mark.parametrize(("select", "factor"), [("random-pivot", 2), ("leverage", 2), ("gaussian", 2), ("pivot", 3)])
def test_error_is_near_the_best(select, factor, known_gram):
    gram = known_gram(200, 1 / np.arange(1, 201))
    best = float((1 / torch.arange(21, 201)).sum())
    assert best <= float(nystrom(gram, 20, select=select).trace_error) <= factor * best


def test_expected_trace_error_of_random_pivots():
    """Chen et al., Theorem 3.1: k = r / ε + r log(1 / (ε δ)) columns leave at most 1 + ε of the best trace error."""
    gram, r, epsilon = kernel(80), 3, 0.5
    values = torch.linalg.eigvalsh(gram).flip(0)
    best = float(values[r:].sum())
    k = int(np.ceil(r / epsilon + r * np.log(float(values.sum()) / (epsilon * best))))
    generator = torch.Generator().manual_seed(0)
    mean = np.mean([float(nystrom(gram, k, generator=generator).trace_error) for _ in range(30)])
    assert mean <= (1 + epsilon) * best


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_exact_recovery_at_exact_rank(select, dtype, scale):
    x = normal(40, 5)
    gram = (x @ x.T * scale).to(dtype)
    for rank in (5, 9, 40):
        result = nystrom(gram, rank, select=select)
        # The shifted sketch is good to its shift, n^(1/2) eps of the norm.
        assert result.error <= 100 * torch.finfo(dtype).eps * gram.double().norm()
        assert result.rank == 5 or (select == "gaussian" and result.rank >= 5)


@pytest.mark.parametrize("select", SELECTIONS)
def test_zero_and_full_rank(select):
    zero = nystrom(torch.zeros(6, 6), 3, select=select)
    assert zero.rank == 0
    assert float(zero.error) == float(zero.trace_error) == 0
    assert torch.equal(zero.reconstruct(), torch.zeros(6, 6))
    gram = normal(7, 20) @ normal(7, 20).T
    assert torch.allclose(nystrom(gram, 99, select=select).reconstruct(), gram, atol=1e-11)
    assert nystrom(torch.full((1, 1), 4.0), 1, select=select).factor.abs().tolist() == [[2.0]]


def test_an_outlier_misleads_only_the_largest_pivot():
    """What the docstring says of "pivot": many single points with a slightly larger diagonal hide a large cluster."""
    gram = torch.zeros(110, 110, dtype=torch.float64)
    gram[:100, :100] = 0.99
    gram[100:, 100:] = torch.eye(10)
    errors = {select: float(nystrom(gram, 5, select=select).trace_error) for select in ("pivot", "random-pivot")}
    assert errors["pivot"] > 100
    assert errors["random-pivot"] < 10


def test_leverage_looks_beyond_the_crowd():
    """A hundred copies of one variable share one score; ten other variables have one each."""
    gram = torch.block_diag(torch.ones(100, 100), torch.eye(10))

    def singles(**options):
        generator = torch.Generator().manual_seed(0)
        drawn = [nystrom(gram, 6, generator=generator, **options).indices for _ in range(50)]
        return np.mean([int((indices >= 100).sum()) for indices in drawn])

    assert singles(select="uniform") < 1
    assert singles(select="leverage") > 1.5
    assert singles(select="leverage", ridge=1e-3) > 4
    assert singles(select="leverage", ridge=1e6) < 1  # all that is left of the scores is the diagonal


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 25),
    inner=st.integers(1, 30),
    rank=st.integers(1, 30),
    select=st.sampled_from(SELECTIONS),
    decimals=st.integers(0, 6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_promises_for_any_gram(n, inner, rank, select, decimals, dtype, seed):
    x = normal(n, inner, seed=seed).round(decimals=decimals).to(dtype).double()
    gram = (x @ x.T).to(torch.float64 if dtype == torch.float64 else torch.float32)
    check(gram, nystrom(gram, rank, select=select))


def test_gram_summed_in_single_precision():
    """Eigenvalues a little below zero are rounding, not an error."""
    x = normal(200, 40).float()
    gram = x @ x.T + 1e-4 * torch.diag(normal(200).float())
    for select in SELECTIONS:
        result = nystrom(gram, 60, select=select)
        assert result.factor.isfinite().all()
        assert result.error <= 1e-3 * gram.norm()


def test_result_repeats_and_input_is_untouched():
    gram = kernel(30).requires_grad_()
    before, state = gram.detach().clone(), torch.get_rng_state()
    for select in SELECTIONS:
        first, second = nystrom(gram, 5, select=select), nystrom(gram, 5, select=select)
        assert torch.equal(first.factor, second.factor)
        assert not first.factor.requires_grad
    other = nystrom(gram, 5, generator=torch.Generator().manual_seed(1))
    assert other.indices.tolist() != nystrom(gram, 5).indices.tolist()
    assert torch.equal(gram.detach(), before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nystrom(torch.eye(3), 0), ValueError, "rank must be at least 1"),
        (lambda: nystrom(torch.eye(3), 1, select="best"), ValueError, "select must be one of random-pivot, pivot"),
        (lambda: nystrom(torch.eye(3), 1, ridge=0.1), ValueError, 'ridge belongs to select="leverage"'),
        (lambda: nystrom(torch.eye(3), 1, select="leverage", ridge=-1), ValueError, "ridge must be a number"),
        (lambda: nystrom(torch.eye(3)[None], 1), LinalgError, "is a batch"),
        (lambda: nystrom(torch.zeros(0, 0), 1), LinalgError, "is empty"),
        (lambda: nystrom(torch.ones(3, 2), 1), LinalgError, "gram: .*is not square"),
        (lambda: nystrom(torch.ones(3, 3).triu(), 1), LinalgError, "is not symmetric"),
        (lambda: nystrom(torch.ones(3, 3).log() / 0, 1), LinalgError, "NaN or Inf"),
        (lambda: nystrom(torch.eye(2).flip(0), 1), LinalgError, "not positive semidefinite"),
        (lambda: nystrom(-torch.eye(2), 1), LinalgError, "not positive semidefinite"),
        (lambda: nystrom(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 2, select="pivot"), LinalgError, "not positive semi"),
        (lambda: nystrom(torch.tensor([[3.0, 2.0], [2.0, 1.0]]), 2, select="gaussian"), LinalgError, "not positive"),
    ],
)
def test_no_right_answer_is_an_error(call, error, message):
    with pytest.raises(error, match=message):
        call()
