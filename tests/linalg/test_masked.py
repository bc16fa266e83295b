"""Oracles: the truncated SVD where everything is observed, planted matrices, alternating least squares in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError, svd
from eckart.linalg.masked import masked_svd


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(m, n, rank, noise=0.0, seed=0):
    return normal(m, rank, seed=seed) @ normal(rank, n, seed=seed + 1) + noise * normal(m, n, seed=seed + 2)


def objective(a, weight, b, shrink=0.0):
    nuclear = float(torch.linalg.svdvals(b).sum())
    return float((weight * (torch.where(weight > 0, a, 0) - b).square()).sum()) / 2 + shrink * nuclear


def alternating(a, weight, rank, rounds=200):
    """Weighted least squares for the left and the right factor in turn, row by row."""
    a, weight = a.numpy(), weight.numpy()
    right = np.linalg.svd(weight * a)[2][:rank].T
    for _ in range(rounds):
        left = np.stack(
            [
                np.linalg.lstsq(np.sqrt(w)[:, None] * right, np.sqrt(w) * x, rcond=None)[0]
                for w, x in zip(weight, a, strict=True)
            ]
        )
        right = np.stack(
            [
                np.linalg.lstsq(np.sqrt(w)[:, None] * left, np.sqrt(w) * x, rcond=None)[0]
                for w, x in zip(weight.T, a.T, strict=True)
            ]
        )
    return torch.from_numpy(left @ right.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (9, 9), (1, 5), (5, 1), (300, 260)], ids=str)
def test_everything_observed_is_the_truncated_svd(shape, dtype):
    a = normal(*shape).to(dtype)
    for rank in {1, 3, min(shape)}:
        for mask in (torch.ones(shape, dtype=torch.bool), torch.full(shape, 7.0)):
            result, reference = masked_svd(a, mask, rank), svd(a, rank, driver="exact")
            tolerance = 1e-11 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(result.reconstruct(), reference.reconstruct(), rtol=0, atol=tolerance)
            scale = float(mask.double().max()) ** 0.5
            assert float(result.error) == pytest.approx(
                float(reference.error) * scale, rel=1e-5, abs=1e-5 * scale * float(a.norm())
            )
            assert bool(result.converged)
            assert int(result.iterations) == 1


@pytest.mark.parametrize(("m", "n", "rank", "share"), [(60, 50, 3, 0.5), (80, 60, 4, 0.35), (40, 70, 2, 0.4)])
def test_a_matrix_of_low_rank_is_recovered(m, n, rank, share):
    a, mask = planted(m, n, rank), uniform(m, n, seed=9) < share
    result = masked_svd(a, mask, rank)
    assert bool(result.converged)
    # The step of 1e-8 at the end, over one minus a convergence rate of at most 0.99.
    assert float((result.reconstruct() - a).norm() / a.norm()) < 1e-6
    torch.testing.assert_close(result.u.mT @ result.u, torch.eye(rank).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(result.vh @ result.vh.mT, torch.eye(rank).double(), rtol=0, atol=1e-12)
    assert bool((result.s.diff() <= 0).all())


@pytest.mark.parametrize("kind", ["mask", "weights"])
def test_the_fit_to_noisy_data_is_that_of_alternating_least_squares(kind):
    a = planted(30, 24, 3, noise=0.1)
    weight = (uniform(30, 24, seed=9) < 0.6).double()
    if kind == "weights":
        weight = weight * normal(30, 24, seed=8).exp()
    result, truth = masked_svd(a, weight, 3, tol=1e-10, max_iterations=5000), alternating(a, weight, 3)
    assert bool(result.converged)
    assert float(result.error) ** 2 / 2 == pytest.approx(objective(a, weight, truth), rel=1e-9)
    torch.testing.assert_close(result.reconstruct(), truth, rtol=0, atol=1e-5)
    assert float(result.error) ** 2 / 2 == pytest.approx(objective(a, weight, result.reconstruct()), rel=1e-12)


@pytest.mark.parametrize("penalty", [0.0, 0.05, 0.3])
def test_the_objective_never_rises(penalty):
    a, weight = planted(30, 20, 4, noise=0.3), uniform(30, 20, seed=9) * (uniform(30, 20, seed=8) < 0.5)
    weight = weight / weight.max()
    shrink = penalty * float(torch.linalg.svdvals(weight * a)[0])
    values = [
        objective(
            a, weight, masked_svd(a, weight, 4, penalty=penalty, max_iterations=steps, tol=1e-12).reconstruct(), shrink
        )
        for steps in range(1, 40)
    ]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(values))
    assert values[-1] < 0.99 * values[0]


@pytest.mark.parametrize("penalty", [0.05, 0.2, 0.6])
def test_a_penalised_fit_meets_the_optimality_conditions(penalty):
    """W ∘ (A - B) = λ (U Vᵀ + Z), UᵀZ = 0, ZV = 0, ||Z|| <= 1: sufficient, the problem is convex."""
    a, mask = planted(25, 20, 5, noise=0.2), uniform(25, 20, seed=9) < 0.6
    shrink = penalty * float(torch.linalg.svdvals(mask * a)[0])
    result = masked_svd(a, mask, 20, penalty=penalty, tol=1e-11, max_iterations=5000)
    assert bool(result.converged)
    kept = int((result.s > 0).sum())
    assert 0 < kept < 20
    u, v = result.u[:, :kept], result.vh[:kept].mT
    z = mask * (a - result.reconstruct()) / shrink - u @ v.mT
    assert float((u.mT @ z).norm()) < 1e-6
    assert float((z @ v).norm()) < 1e-6
    assert float(torch.linalg.matrix_norm(z, 2)) < 1 + 1e-6


def test_with_everything_observed_the_penalty_lowers_the_singular_values():
    a = normal(12, 9)
    s = torch.linalg.svdvals(a)
    result = masked_svd(a, torch.ones(12, 9), 9, penalty=0.4)
    torch.testing.assert_close(result.s, (s - 0.4 * s[0]).clamp(min=0), rtol=0, atol=1e-9)
    assert not bool(masked_svd(a, torch.ones(12, 9), 9, penalty=1.0).reconstruct().any())


def test_what_was_not_observed_does_not_matter():
    a, mask = planted(20, 15, 2), uniform(20, 15, seed=9) < 0.7
    first = masked_svd(a, mask, 2)
    for hole in (float("nan"), float("inf"), 1e30):
        other = masked_svd(torch.where(mask, a, hole), mask, 2)
        assert torch.equal(first.reconstruct(), other.reconstruct())
        assert torch.equal(first.error, other.error)


def test_a_row_and_a_column_without_observation_are_zero():
    a, mask = planted(20, 15, 2), uniform(20, 15, seed=9) < 0.8
    mask[3], mask[:, [5, 6]] = False, False
    result = masked_svd(a, mask, 2)
    b = result.reconstruct()
    assert not bool(b[3].any())
    assert not bool(b[:, [5, 6]].any())
    rest = torch.ones(20, 15, dtype=torch.bool)
    rest[3], rest[:, [5, 6]] = False, False
    torch.testing.assert_close(b[rest], a[rest], rtol=0, atol=1e-5)
    nothing = masked_svd(a, torch.zeros(20, 15), 2)
    assert not bool(nothing.reconstruct().any())
    assert bool(nothing.converged)
    assert float(nothing.error) == 0


def test_weights_are_relative():
    a, weight = planted(20, 15, 3, noise=0.2), uniform(20, 15, seed=9)
    result, scaled = masked_svd(a, weight, 2), masked_svd(a, weight * 1e8, 2)
    torch.testing.assert_close(result.reconstruct(), scaled.reconstruct(), rtol=0, atol=1e-12)
    assert float(scaled.error) == pytest.approx(float(result.error) * 1e4, rel=1e-9)


def test_weights_of_rows_and_columns_have_a_closed_form():
    """W_ij = r_i c_j: scale the rows and columns, cut, and scale back."""
    a, r, c = normal(12, 9), 0.2 + uniform(12), 0.2 + uniform(9, seed=1)
    result = masked_svd(a, r[:, None] * c, 3, tol=1e-11, max_iterations=10000)
    cut = svd(r.sqrt()[:, None] * a * c.sqrt(), 3)
    assert bool(result.converged)
    torch.testing.assert_close(
        result.reconstruct(), cut.reconstruct() / r.sqrt()[:, None] / c.sqrt(), rtol=0, atol=1e-6
    )
    assert float(result.error) == pytest.approx(float(cut.error), rel=1e-9)


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_a_warm_start_continues(penalty):
    a, mask = planted(40, 30, 3, noise=0.1), uniform(40, 30, seed=9) < 0.4
    cold = masked_svd(a, mask, 3, penalty=penalty)
    half = masked_svd(a, mask, 3, penalty=penalty, max_iterations=int(cold.iterations) // 2)
    assert not bool(half.converged)
    assert int(half.iterations) == int(cold.iterations) // 2
    warm = masked_svd(a, mask, 3, penalty=penalty, start=half)
    torch.testing.assert_close(warm.reconstruct(), cold.reconstruct(), rtol=0, atol=1e-5)
    again = masked_svd(a, mask, 3, penalty=penalty, start=cold)
    assert int(again.iterations) <= 3
    path = masked_svd(a, mask, 3, penalty=penalty, start=svd(a * mask, 3))
    torch.testing.assert_close(path.reconstruct(), cold.reconstruct(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_scale_and_dtype(scale, dtype):
    a, mask = planted(30, 20, 2, noise=0.05), uniform(30, 20, seed=9) < 0.7
    reference = masked_svd(a, mask, 2)
    for start in (None, masked_svd((a * scale).to(dtype), mask, 2, max_iterations=5)):
        result = masked_svd((a * scale).to(dtype), mask, 2, start=start)
        assert result.s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # The last step is below 1e-8 or 1e-5 of a norm of 40; the distance to the limit is some ten times that.
        tolerance = {torch.float64: 1e-5, torch.float32: 1e-2, torch.bfloat16: 0.05}[dtype]
        b = (result.u.double() * (result.s.double() / scale)) @ result.vh.double()
        torch.testing.assert_close(b, reference.reconstruct(), rtol=0, atol=tolerance)
        assert float(result.error) / scale == pytest.approx(float(reference.error), rel=max(tolerance, 1e-6))
        assert bool(result.converged)


def test_batch_and_inputs_unchanged():
    a, mask = torch.stack([planted(15, 12, 2, 0.1, seed) for seed in range(3)]).mT, uniform(3, 12, 15, seed=9) < 0.7
    copies = a.clone(), mask.clone()
    result = masked_svd(a, mask, 2)
    shared = masked_svd(a, mask[0], 2)
    for i in range(3):
        one = masked_svd(a[i], mask[i], 2)
        for name in ("u", "s", "vh", "error", "iterations", "converged"):
            torch.testing.assert_close(getattr(result, name)[i], getattr(one, name))
        torch.testing.assert_close(shared.s[i], masked_svd(a[i], mask[0], 2).s)
    assert torch.equal(a, copies[0])
    assert torch.equal(mask, copies[1])


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 8),
    n=st.integers(1, 8),
    rank=st.integers(1, 8),
    share=st.floats(0, 1),
    weighted=st.booleans(),
    penalty=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_any_mask(m, n, rank, share, weighted, penalty, dtype, seed):
    a, weight = normal(m, n, seed=seed).to(dtype), (uniform(m, n, seed=seed + 1) < share).double()
    weight = weight * uniform(m, n, seed=seed + 2) if weighted else weight
    result = masked_svd(a, weight, rank, penalty=penalty, max_iterations=60)
    b = result.reconstruct()
    assert bool(b.isfinite().all())
    assert result.s.shape == (min(rank, m, n),)
    true = float((weight * (a.double() - b.double()).square()).sum()) ** 0.5
    assert float(result.error) == pytest.approx(true, rel=1e-3, abs=1e-5)
    # No worse than zero.
    top = weight.max() if bool(weight.any()) else 1.0
    shrink = penalty * float(torch.linalg.svdvals(weight / top * a.double())[0])
    assert (
        objective(a.double(), weight / top, b.double(), shrink)
        <= objective(a.double(), weight / top, 0 * b.double()) * (1 + 1e-5) + 1e-9
    )
    repeated = masked_svd(a, weight, rank, penalty=penalty, max_iterations=60)
    assert torch.equal(repeated.u, result.u)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: masked_svd(torch.ones(2, 2), torch.ones(2, 2), 0), ValueError, "rank must be at least 1, not 0"),
        (
            lambda: masked_svd(torch.ones(2, 2), torch.ones(2, 2), 1, penalty=-1.0),
            ValueError,
            "penalty must be a finite",
        ),
        (lambda: masked_svd(torch.ones(2, 2), torch.ones(2, 2), 1, tol=0.0), ValueError, "tol must be positive"),
        (
            lambda: masked_svd(torch.ones(2, 2), torch.ones(2, 2), 1, max_iterations=0),
            ValueError,
            "max_iterations must",
        ),
        (lambda: masked_svd(torch.ones(2, 2), torch.ones(2, 3), 1), LinalgError, r"mask: .*does not fit a of shape"),
        (lambda: masked_svd(torch.ones(2, 2), -torch.ones(2, 2), 1), LinalgError, "mask: .*negative, NaN or Inf"),
        (lambda: masked_svd(torch.ones(1, 1), torch.full((1, 1), torch.nan), 1), LinalgError, "mask: .*negative, NaN"),
        (
            lambda: masked_svd(torch.full((1, 1), torch.nan), torch.ones(1, 1), 1),
            LinalgError,
            "a: .*contains NaN or Inf",
        ),
        (lambda: masked_svd(torch.ones(0, 2), torch.ones(0, 2), 1), LinalgError, "a: .*is not a matrix with entries"),
        (lambda: masked_svd(torch.ones(2), torch.ones(2), 1), LinalgError, "a: .*is not a matrix with entries"),
        (
            lambda: masked_svd(torch.ones(3, 3), torch.ones(3, 3), 2, start=svd(torch.ones(3, 3), 1)),
            LinalgError,
            "start: .*is no result of rank 2",
        ),
    ],
)
def test_what_has_no_answer_is_refused(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
