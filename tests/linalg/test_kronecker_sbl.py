"""kronecker_sbl: equal to the dense formulas, and sparse where the vector is."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError
from eckart.linalg.kronecker_sbl import (
    KroneckerSBL,
    _alternate,
    _nearest_kronecker,
    kronecker_posterior,
    kronecker_sbl,
)


def draw(shape, seed, complex_numbers=False) -> torch.Tensor:
    dtype = torch.complex128 if complex_numbers else torch.float64
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def kron(parts) -> torch.Tensor:
    return reduce(torch.kron, [part.contiguous() for part in parts])


def problem(seed=0, *, factors=3, rows=6, columns=8, nonzeros=2, decibel=20, complex_numbers=False):
    """y, the dictionaries, x with a Kronecker-structured support (but entries that are no product), the noise."""
    dictionaries = [draw((rows, columns), 10 * seed + f, complex_numbers) / rows**0.5 for f in range(factors)]
    support = []
    for f in range(factors):
        part = torch.zeros(columns, dtype=torch.float64)
        part[torch.randperm(columns, generator=torch.Generator().manual_seed(100 * seed + f))[:nonzeros]] = 1
        support.append(part)
    entries = draw((columns**factors,), seed + 50, complex_numbers)
    x = kron(support) * (entries + 2 * entries / entries.abs())  # none is close to zero
    clean = kron(dictionaries) @ x
    noise = float(clean.abs().square().mean()) * 10 ** (-decibel / 10)
    return clean + draw(clean.shape, seed + 70, complex_numbers) * noise**0.5, dictionaries, x, noise


def dense_posterior(y, dictionaries, g, noise):
    """The textbook: with B = G Hᴴ (s I + H G Hᴴ)⁻¹ the covariance is G - B H G and the mean B y; in numpy."""
    h = kron(dictionaries).numpy()
    prior = np.diag(kron(g).numpy())
    gain = np.linalg.solve(noise * np.eye(h.shape[0]) + h @ prior @ h.conj().T, h @ prior).conj().T
    return gain @ y.flatten().numpy(), np.diag(prior - gain @ h @ prior).real


@pytest.mark.parametrize("complex_numbers", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("shapes", [[(4, 6)], [(3, 5), (4, 2)], [(2, 3), (3, 4), (3, 3)]], ids=["1", "2", "3"])
def test_posterior_is_the_dense_one(shapes, complex_numbers):
    dictionaries = [draw(shape, f, complex_numbers) for f, shape in enumerate(shapes)]
    g = [draw(shape[1:], 10 + f).abs() for f, shape in enumerate(shapes)]
    g[0][0] = 0
    y = draw([shape[0] for shape in shapes], 20, complex_numbers)
    mean, variance = kronecker_posterior(y, dictionaries, g, 0.3)
    dense_mean, dense_variance = dense_posterior(y, dictionaries, g, 0.3)
    # Both are backward stable; s = 0.3 keeps the condition number below 1e4, so 1e-12 leaves two digits.
    assert np.abs(mean.flatten().numpy() - dense_mean).max() < 1e-12
    assert np.abs(variance.flatten().numpy() - dense_variance).max() < 1e-12
    assert (variance >= 0).all()


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=3),
    complex_numbers=st.booleans(),
    decades=st.integers(-3, 3),
    seed=st.integers(0, 10**6),
)
def test_posterior_of_any_problem_is_the_dense_one(shapes, complex_numbers, decades, seed):
    dictionaries = [draw(shape, seed + f, complex_numbers) for f, shape in enumerate(shapes)]
    g = [draw(shape[1:], seed + 10 + f).abs() for f, shape in enumerate(shapes)]
    y = draw([shape[0] for shape in shapes], seed + 20, complex_numbers)
    mean, variance = kronecker_posterior(y, dictionaries, g, 10.0**decades)
    dense_mean, dense_variance = dense_posterior(y, dictionaries, g, 10.0**decades)
    # The dense matrix to be solved has a condition number of up to about 1e6 for the smallest noise.
    assert np.abs(mean.flatten().numpy() - dense_mean).max() < 1e-9 * (1 + np.abs(dense_mean).max())
    assert np.abs(variance.flatten().numpy() - dense_variance).max() < 1e-9 * (1 + float(kron(g).max()))


def test_moving_a_scale_from_one_factor_to_another_changes_nothing():
    y, dictionaries = draw((3, 3), 1), [draw((3, 4), 2), draw((3, 5), 3)]
    g = [draw((4,), 4).abs(), draw((5,), 5).abs()]
    for one, other in zip(
        kronecker_posterior(y, dictionaries, g, 0.1),
        kronecker_posterior(y, dictionaries, [7 * g[0], g[1] / 7], 0.1),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sizes", [[5], [4, 3], [3, 4, 2], [2, 3, 2, 3]])
def test_both_updates_return_an_exact_kronecker_product(sizes):
    parts = [draw((size,), f).abs() + 0.1 for f, size in enumerate(sizes)]
    tensor = kron(parts)
    for found in (
        _nearest_kronecker(tensor.view(sizes)),
        _alternate(tensor.view(sizes), [torch.ones(n).double() for n in sizes]),
    ):
        assert torch.allclose(kron(found), tensor, rtol=1e-12)
        for part in found[:-1]:
            assert float(part.norm()) == pytest.approx(1, abs=1e-12)


def test_svd_update_of_a_matrix_is_the_best_rank_one_fit():
    tensor = draw((6, 7), 3).square()
    u, s, vt = np.linalg.svd(tensor.numpy())
    found = kron(_nearest_kronecker(tensor)).view(6, 7).numpy()
    assert np.allclose(found, s[0] * np.outer(u[:, 0], vt[0]), atol=1e-12)


def test_alternating_update_is_stationary():
    second = draw((4, 5, 3), 3).square() + 0.01
    g = _alternate(second, [torch.ones(n).double() for n in (4, 5, 3)])
    product = torch.einsum("i,j,k->ijk", *g)
    for mode in range(3):
        # d/dlog g_i of sum (log g + L / g) is the sum of 1 - L / g over the slab i; the passes stop at 1e-5.
        slabs = (1 - second / product).mean(dim=[m for m in range(3) if m != mode])
        assert slabs.abs().max() < 1e-4


@pytest.mark.parametrize("complex_numbers", [False, True], ids=["real", "complex"])
def test_alternating_minimisation_never_lowers_the_likelihood(complex_numbers):
    y, dictionaries, _, noise = problem(1, factors=2, complex_numbers=complex_numbers)
    h, costs = kron(dictionaries).numpy(), []
    for iterations in range(1, 25, 2):
        result = kronecker_sbl(
            y, dictionaries, noise=noise, solver="am", prune=0.0, tol=1e-15, max_iterations=iterations
        )
        marginal = noise * np.eye(h.shape[0]) + (h * kron(result.hyperparameters).numpy()) @ h.conj().T
        quadratic = (y.numpy().conj() @ np.linalg.solve(marginal, y.numpy())).real
        costs.append(np.linalg.slogdet(marginal)[1] + quadratic)
    assert (np.diff(costs) < 1e-9 * abs(costs[0])).all()
    assert costs[-1] < costs[0] - 10


def test_one_factor_is_classic_sparse_bayesian_learning():
    y, (a,), _, noise = problem(2, factors=1, rows=12, columns=20, nonzeros=3)
    result = kronecker_sbl(y, [a], noise=noise, prune=0.0, tol=1e-15, max_iterations=30)
    # The same start: g = 1 where y and the columns have a mean square and a mean squared length of 1.
    g = np.full(20, float(y.square().mean()) / float(a.square().sum() / 20))
    for _ in range(30):
        mean, variance = dense_posterior(y, [a], [torch.from_numpy(g)], noise)
        g = variance + mean**2
    mean, variance = dense_posterior(y, [a], [torch.from_numpy(g)], noise)
    # Thirty steps may each magnify the rounding of the one before a little: 1e-9 of the largest entry.
    assert np.abs(result.hyperparameters[0].numpy() - g).max() < 1e-9 * g.max()
    assert np.abs(result.x.numpy() - mean).max() < 1e-9 * np.abs(mean).max()
    assert np.abs(result.variance.numpy() - variance).max() < 1e-9 * g.max()


@pytest.mark.parametrize("complex_numbers", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("known", [True, False], ids=["noise known", "noise unknown"])
@pytest.mark.parametrize("solver", ["svd", "am"])
def test_recovers_vector_and_support(solver, known, complex_numbers):
    for seed in range(3):
        y, dictionaries, x, noise = problem(seed, decibel=30, complex_numbers=complex_numbers)
        result = kronecker_sbl(
            y, dictionaries, noise=noise if known else None, solver=solver, prune=1e-2, max_iterations=400
        )
        error = float((result.x - x).norm() / x.norm())
        # Least squares on the true support of 8 from 216 measurements at 30 dB would have about sqrt(8 / 216) 3 %.
        assert error < 0.03
        assert torch.equal(result.x.abs() > 0.1 * x.abs().max(), x != 0)
        assert result.noise == noise if known else 0.3 < result.noise / noise < 1.5


def test_pruned_entries_are_zero_and_the_rest_is_the_posterior_of_the_rest():
    y, dictionaries, _, noise = problem(3)
    result = kronecker_sbl(y, dictionaries, noise=noise)
    kept = [part > 0 for part in result.hyperparameters]
    assert all(0 < int(k.sum()) < 8 for k in kept)
    alive = kron([k.double() for k in kept]).bool()
    assert (result.x[~alive] == 0).all()
    assert (result.variance[~alive] == 0).all()
    mean, variance = dense_posterior(y, dictionaries, result.hyperparameters, noise)
    assert np.abs(result.x.numpy() - mean).max() < 1e-10 * np.abs(mean).max()
    assert np.abs(result.variance.numpy() - variance).max() < 1e-10 * variance.max()


def test_reported_error_is_the_residual():
    y, dictionaries, _, _ = problem(4)
    result = kronecker_sbl(y.view(6, 6, 6), dictionaries)
    assert result.error == pytest.approx(float((y - kron(dictionaries) @ result.x).norm()), rel=1e-9)


@pytest.mark.parametrize(("y_scale", "scale"), [(1e30, 1.0), (1e-30, 1.0), (1.0, 1e30), (1e-30, 1e-30), (1e30, 1e30)])
def test_units_do_not_matter(y_scale, scale):
    y, dictionaries, _, noise = problem(5, factors=2)
    plain = kronecker_sbl(y, dictionaries, noise=noise)
    other = kronecker_sbl(y * y_scale, [dictionaries[0] * scale, dictionaries[1]], noise=noise * y_scale * y_scale)
    factor = y_scale / scale
    # The scaled problem differs in its last bits, which the pruning and the stop rule do not magnify here.
    assert torch.allclose(other.x / factor, plain.x, rtol=1e-6, atol=1e-9 * float(plain.x.abs().max()))
    assert torch.allclose(other.variance / factor**2, plain.variance, rtol=1e-6, atol=1e-12)
    assert other.iterations == plain.iterations


@pytest.mark.parametrize(
    ("given_dtype", "returned"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.complex64),
        (torch.complex128, torch.complex128),
    ],
)
def test_dtypes(given_dtype, returned):
    y, dictionaries, x, _ = problem(6, factors=2, complex_numbers=given_dtype.is_complex)
    result = kronecker_sbl(y.to(given_dtype), [a.to(given_dtype) for a in dictionaries])
    assert result.x.dtype == returned
    assert result.variance.dtype == result.hyperparameters[0].dtype == torch.float64
    assert float((result.x.to(x.dtype) - x).norm() / x.norm()) < 0.3


def test_complex_measurements_of_real_dictionaries():
    _, dictionaries, x, _ = problem(7, factors=2)
    x = x * (1 + 2j)
    result = kronecker_sbl(kron(dictionaries).to(x.dtype) @ x, dictionaries, noise=1e-8)
    assert float((result.x - x).norm() / x.norm()) < 1e-3


@pytest.mark.parametrize("solver", ["svd", "am"])
@pytest.mark.parametrize("noise", [None, 1e-3])
def test_degenerate_problems(solver, noise):
    for y, dictionaries in [
        (torch.zeros(4), [torch.eye(2), torch.eye(2)]),
        (torch.tensor([3.0]), [torch.ones(1, 1)]),
        (torch.ones(6), [torch.ones(2, 4), torch.ones(3, 5)]),
        (torch.ones(6), [torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.eye(3)]),
        (torch.ones(2, 1, 3), [torch.eye(2), torch.ones(1, 3), torch.eye(3)]),
    ]:
        result = kronecker_sbl(y, dictionaries, noise=noise, solver=solver)
        for part in (result.x, result.variance, *result.hyperparameters):
            assert part.isfinite().all()
        assert result.error <= float(y.norm()) * (1 + 1e-6)
    assert kronecker_sbl(torch.zeros(4), [torch.eye(4)], noise=noise, solver=solver).x.abs().max() == 0


def test_result_repeats_and_inputs_are_untouched():
    y, dictionaries, _, _ = problem(8, factors=2)
    y.requires_grad_()
    before = [y.detach().clone(), *(a.clone() for a in dictionaries)]
    first, second = (kronecker_sbl(y, dictionaries) for _ in range(2))
    assert torch.equal(first.x, second.x)
    assert not first.x.requires_grad
    for old, new in zip(before, [y.detach(), *dictionaries], strict=True):
        assert torch.equal(old, new)


def test_method_runs_the_function_with_its_options():
    y, dictionaries, _, noise = problem(9, factors=2)
    method = KroneckerSBL(solver="am", prune=0.05, tol=1e-3, max_iterations=20)
    direct = kronecker_sbl(y, dictionaries, noise=noise, solver="am", prune=0.05, tol=1e-3, max_iterations=20)
    assert torch.equal(method(y, dictionaries, noise=noise).x, direct.x)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    extra=st.integers(0, 3),
    solver=st.sampled_from(["svd", "am"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.complex64]),
    prune=st.sampled_from([None, 0.0, 0.5]),
    seed=st.integers(0, 10**6),
)
def test_any_problem_has_a_finite_answer_that_fits_better_than_nothing(rows, extra, solver, dtype, prune, seed):
    generator = torch.Generator().manual_seed(seed)
    dictionaries = [torch.randn(m, m + extra, dtype=dtype, generator=generator) for m in rows]
    y = torch.randn(int(np.prod(rows)), dtype=dtype, generator=generator)
    result = kronecker_sbl(y, dictionaries, solver=solver, prune=prune, max_iterations=20)
    assert result.x.shape == (int(np.prod([m + extra for m in rows])),)
    assert result.x.dtype == dtype
    assert bool(result.x.isfinite().all())
    assert (kron(result.hyperparameters) >= result.variance * (1 - 1e-9)).all(), "data cannot add uncertainty"
    assert result.error <= float(y.norm()) * (1 + 1e-5), "a posterior mean never fits worse than zero"


@pytest.mark.parametrize(
    ("y", "dictionaries", "message"),
    [
        (torch.ones(5), [torch.eye(2), torch.eye(3)], r"y: shape \(5,\).*\(2, 3\) rows"),
        (torch.ones(3, 2), [torch.eye(2), torch.eye(3)], r"does not fit dictionaries"),
        (torch.ones(2).log() / 0, [torch.eye(2)], "y: .*NaN or Inf"),
        (torch.ones(2), [torch.eye(2) * torch.inf], r"dictionaries\[0\]: .*NaN or Inf"),
        (torch.ones(2), [torch.zeros(2, 3)], "is not a matrix with nonzero entries"),
        (torch.ones(2), [torch.ones(2)], "is not a matrix"),
        (torch.ones(2, dtype=torch.int64), [torch.eye(2)], "neither float nor complex"),
        (torch.ones(2) * 1e30, [torch.eye(2) * 1e-30], "overflows this dtype"),
    ],
)
def test_impossible_input_is_named(y, dictionaries, message):
    with pytest.raises(LinalgError, match=message):
        kronecker_sbl(y, dictionaries)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "em"}, "solver must be one of svd, am, not 'em'"),
        ({"noise": 0.0}, "noise must be a positive variance"),
        ({"prune": 1.0}, r"prune must lie in \[0, 1\)"),
        ({"tol": 0.0}, "tol must be positive"),
        ({"max_iterations": 0}, "max_iterations must be at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        kronecker_sbl(torch.ones(2), [torch.eye(2)], **options)
    if "noise" not in options:
        with pytest.raises(ValueError, match=message):
            KroneckerSBL(**options)


def test_no_dictionary():
    with pytest.raises(ValueError, match="at least one matrix"):
        kronecker_sbl(torch.ones(2), [])
