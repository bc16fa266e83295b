from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError
from eckart.linalg.tensors.cp import cp
from eckart.linalg.tensors.products import khatri_rao, unfold

DTYPES = [torch.float32, torch.float64]


def outer_sum(weights, factors):
    """Sum of outer products, term by term, in numpy."""
    total = np.zeros([factor.shape[0] for factor in factors])
    for i, w in enumerate(weights.double().numpy()):
        term = np.array(w)
        for factor in factors:
            term = np.multiply.outer(term, factor.double().numpy()[:, i])
        total = total + term
    return torch.from_numpy(total)


def planted(shape, rank, gaussian, seed=0):
    factors = [gaussian(n, rank, seed=seed + d) for d, n in enumerate(shape)]
    return outer_sum(torch.ones(rank), factors), factors


@pytest.fixture(scope="module")
def check(distance):
    """check(t, rank, ...) -> the result, after the laws of a CP were tested on it."""

    def verify(t, rank, **options):
        result = cp(t, rank, **options)
        eps, size = torch.finfo(result.weights.dtype).eps, float(t.double().norm())
        assert result.rank == rank
        assert result.parameters == rank * sum(t.shape)
        assert [factor.shape for factor in result.factors] == [(n, rank) for n in t.shape]
        assert (result.weights >= 0).all()
        assert (result.weights.diff() <= 0).all()
        for factor in result.factors:
            assert torch.allclose(factor.double().norm(dim=0), torch.ones(rank).double(), atol=10 * eps)
        for factor in result.factors[:-1]:
            assert (factor.gather(0, factor.abs().argmax(dim=0, keepdim=True)) > 0).all()
        made = distance(t, result.reconstruct())
        # nearly cancelling terms make rounding as large as their weights
        rounding = 20 * eps * (size + float(result.weights.double().sum()))
        assert distance(outer_sum(result.weights, result.factors), result.reconstruct()) <= rounding
        assert float(result.error) == pytest.approx(made, rel=2e-3, abs=rounding)
        assert result.error.dtype == torch.float64
        assert made <= size + rounding
        return result

    return verify


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", ["hosvd", "random"])
@pytest.mark.parametrize("shape", [(6, 7, 8), (30, 3, 5), (5, 4, 6, 3), (3, 4, 3, 4, 3)], ids=str)
def test_random_terms_are_recovered(shape, init, dtype, gaussian, check):
    t, factors = planted(shape, 3, gaussian)
    result = check(t.to(dtype), 3, init=init, starts=3)
    assert float(result.error) < 1e-3 * float(t.norm())
    # unique up to order and sign
    for found, true in zip(result.factors, factors, strict=True):
        cosines = (found.double().T @ (true / true.norm(dim=0))).abs()
        assert torch.allclose(cosines.amax(dim=0), torch.ones(3).double(), atol=1e-3)


def test_one_term_is_exact(gaussian, check):
    t, factors = planted((4, 5, 6), 1, gaussian)
    result = check(t, 1)
    assert float(result.error) < 1e-13
    assert float(result.weights[0]) == pytest.approx(float(np.prod([f.norm() for f in factors])))


def test_more_terms_than_sizes(gaussian, check):
    t, _ = planted((4, 4, 4), 5, gaussian)
    assert float(check(t, 5, starts=3, max_sweeps=1000).error) < 1e-2 * float(t.norm())


def test_an_orthogonal_tensor_is_found_at_once(check):
    q = [torch.from_numpy(np.linalg.qr(np.random.default_rng(s).standard_normal((7, 4)))[0]) for s in range(3)]
    weights = torch.tensor([4.0, 3.0, 2.0, 1.0]).double()
    result = check(outer_sum(weights, q), 4)
    assert torch.allclose(result.weights, weights)
    best_two = check(outer_sum(weights, q), 2, tol=1e-12)
    assert float(best_two.error) == pytest.approx(5**0.5)  # the two smallest weights are left out


@pytest.mark.parametrize("dtype", DTYPES)
def test_sweeps_never_raise_the_error(dtype, gaussian, check):
    t = gaussian(6, 7, 8).to(dtype)
    errors = [float(check(t, 4, max_sweeps=k, tol=1e-12).error) for k in (1, 2, 3, 10, 100)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_result_is_stationary(gaussian, check):
    t = gaussian(5, 6, 7, 4)
    result = check(t, 3, max_sweeps=5000, tol=1e-14)
    scaled = [result.factors[0] * result.weights, *result.factors[1:]]
    for d in range(4):  # the normal equations hold in every mode
        others = khatri_rao([scaled[e] for e in range(4) if e != d])
        gradient = (scaled[d] @ others.T - unfold(t, d)) @ others
        assert float(gradient.norm()) < 1e-4 * float((unfold(t, d) @ others).norm())


def test_more_starts_are_no_worse_and_the_best_is_kept(gaussian):
    t = gaussian(4, 5, 6)
    errors = [float(cp(t, 5, starts=k).error) for k in (1, 3, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_scale_of_the_tensor_is_that_of_the_weights(factor, gaussian, check):
    t = planted((5, 6, 7), 2, gaussian)[0].float()
    plain, scaled = cp(t, 2), cp(t * factor, 2)
    assert torch.allclose(scaled.weights.double() / factor, plain.weights.double(), rtol=1e-3)


def test_degenerate_tensors(gaussian, check):
    for t, rank in [
        (torch.zeros(3, 4, 5), 2),
        (torch.ones(1, 1, 1), 1),
        (torch.ones(2, 2, 2), 3),
        (gaussian(1, 6, 1), 2),
        (gaussian(5, 4, 6).permute(2, 0, 1)[:, ::2], 2),
        (planted((4, 5, 6), 2, gaussian)[0], 4),  # more terms than there are
        (gaussian(4, 3, 5).bfloat16(), 2),
    ]:
        result = check(t, rank)
        assert result.weights.dtype == (torch.float64 if t.dtype == torch.float64 else torch.float32)


def test_a_tensor_without_a_best_approximation_stays_finite(check):
    a, b = torch.eye(2).double().unbind()
    t = sum(torch.einsum("i,j,k->ijk", *v) for v in ((a, a, b), (a, b, a), (b, a, a)))
    # rank 3, but a limit of tensors of rank 2, whose two terms grow for ever and nearly cancel
    result = check(t, 2, init="random", max_sweeps=300)
    assert float(result.error) < 0.2
    assert float(result.weights[1]) > float(t.norm())


def test_result_repeats_and_input_is_unchanged(gaussian):
    t = gaussian(4, 5, 6).requires_grad_()
    before = t.detach().clone()
    first, second = cp(t, 3, init="random"), cp(t, 3, init="random")
    assert all(torch.equal(a, b) for a, b in zip(first.factors, second.factors, strict=True))
    assert torch.equal(t.detach(), before)
    assert not first.weights.requires_grad
    other = cp(t, 3, init="random", max_sweeps=1, generator=torch.Generator().manual_seed(4))
    assert not torch.equal(other.weights, cp(t, 3, init="random", max_sweeps=1).weights)


def test_trained_factors_have_gradients(gaussian):
    result = cp(gaussian(4, 5, 6), 2)
    weights = result.weights.clone().requires_grad_()
    result._replace(weights=weights).reconstruct().sum().backward()
    expected = torch.stack([factor.sum(dim=0) for factor in result.factors]).prod(dim=0)
    assert torch.allclose(weights.grad, expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1, not 0"),
        ({"rank": 2, "starts": 0}, ValueError, "starts must be at least 1"),
        ({"rank": 2, "max_sweeps": 0}, ValueError, "max_sweeps must be at least 1"),
        ({"rank": 2, "tol": 0}, ValueError, "tol must be positive"),
        ({"rank": 2, "init": "svd"}, ValueError, "init must be one of hosvd, random, not 'svd'"),
        ({"rank": 2, "t": torch.ones(3, 4)}, LinalgError, r"\(3, 4\).*order 3 or more; use svd"),
        ({"rank": 2, "t": torch.full((2, 3, 4), torch.nan)}, LinalgError, "contains NaN or Inf"),
        ({"rank": 2, "t": torch.ones(2, 0, 3)}, LinalgError, "no tensor with entries"),
        ({"rank": 2, "t": torch.ones(2, 2, 3).long()}, LinalgError, "not real floating point"),
    ],
)
def test_what_cannot_be_done_is_said(options, error, message, gaussian):
    with pytest.raises(error, match=message):
        cp(**({"t": gaussian(3, 4, 5)} | options))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=3, max_size=4),
    rank=st.integers(1, 6),
    init=st.sampled_from(["hosvd", "random"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    decimals=st.sampled_from([0, 8]),
    seed=st.integers(0, 99),
)
def test_laws_for_any_tensor(shape, rank, init, dtype, decimals, seed, smooth, check):
    t = smooth(*shape, seed=seed).round(decimals=decimals).to(dtype)
    check(t, rank, init=init, max_sweeps=50)
