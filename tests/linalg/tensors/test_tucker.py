"""tucker: bounds from the singular values of the unfoldings, which numpy works out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError, svd
from eckart.linalg.tensors.products import multilinear_product, unfold
from eckart.linalg.tensors.tucker import tucker

METHODS = ["sthosvd", "hosvd", "hooi"]
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(scope="module")
def check(tail, distance):
    """check(t, ranks, ...) -> the result, after every law of a Tucker decomposition was tested on it."""

    def verify(t, ranks, slack=1.0, rounding=None, **options):
        result = tucker(t, ranks, **options)
        wanted = [ranks] * t.ndim if isinstance(ranks, int) else ranks
        size = float(t.double().norm())
        rounding = rounding or 50 * torch.finfo(result.core.dtype).eps
        assert result.error.dtype == torch.float64
        assert result.ranks == tuple(factor.shape[1] for factor in result.factors)
        assert all(r <= min(k, n) for r, k, n in zip(result.ranks, wanted, t.shape, strict=True))
        assert result.parameters == math.prod(result.ranks) + sum(
            n * r for n, r in zip(t.shape, result.ranks, strict=True)
        )
        for factor in result.factors:
            wide = factor.double()
            assert torch.allclose(wide.T @ wide, torch.eye(factor.shape[1]).double(), atol=rounding)
        made = distance(t, result.reconstruct())
        assert float(result.error) == pytest.approx(made, rel=1e-3, abs=rounding * size)
        # the error of the best approximation lies between the largest tail and the root of the sum of squares
        tails = [tail(unfold(t, d), k) for d, k in enumerate(wanted)]
        assert made <= slack * math.hypot(*tails) + rounding * size
        assert made >= max(tails) - rounding * size
        return result

    return verify


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("shape", "ranks"),
    [((7,), 1), ((9, 6), 3), ((6, 7, 8), (2, 3, 4)), ((5, 6, 4, 3), (2, 6, 4, 1)), ((3, 2, 4, 2, 3), 2)],
    ids=str,
)
def test_error_is_within_the_bounds(shape, ranks, method, dtype, smooth, check):
    check(smooth(*shape).to(dtype), ranks, method=method)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_known_ranks_are_recovered(method, dtype, gaussian, check):
    core, factors = gaussian(2, 3, 4), [gaussian(n, r, seed=n) for n, r in ((8, 2), (9, 3), (7, 4))]
    t = multilinear_product(core, factors).to(dtype)
    result = check(t, (2, 3, 4), method=method)
    assert float(result.error) < 50 * torch.finfo(dtype).eps * float(t.norm())
    for found, true in zip(result.factors, factors, strict=True):  # same column space
        q = torch.linalg.qr(true.to(dtype))[0]
        assert torch.allclose(found @ (found.T @ q), q, atol=1e3 * torch.finfo(dtype).eps)


def test_single_precision_keeps_small_singular_values(gaussian, check):
    # 1e-5 of the largest: lost in a float32 Gram matrix, whose eigenvalue would be 1e-10 of the largest
    q = [torch.linalg.qr(gaussian(n, 2, seed=n))[0] for n in (8, 9, 300)]
    core = torch.zeros(2, 2, 2, dtype=torch.float64)
    core[0, 0, 0], core[1, 1, 1] = 1, 1e-5
    result = check(multilinear_product(core, q).float(), 2)
    assert abs(float((result.factors[0][:, 1].double() * q[0][:, 1]).sum())) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_full_ranks_are_the_identity(method, gaussian):
    t = gaussian(4, 3, 5)
    for ranks in ((4, 3, 5), 9):
        result = tucker(t, ranks, method=method)
        assert torch.equal(result.core, t)
        assert torch.equal(result.reconstruct(), t)
        assert float(result.error) == 0


def test_a_mode_of_full_rank_is_left_alone(smooth, check):
    result = check(smooth(8, 6, 3, 3), (2, 3, 3, 3))
    assert torch.equal(result.factors[2], torch.eye(3, dtype=torch.float64))
    assert result.ranks == (2, 3, 3, 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_order_two_is_the_truncated_svd(shape, method, gaussian):
    a = gaussian(*shape)
    result, plain = tucker(a, 4, method=method), svd(a, 4)
    assert torch.allclose(result.reconstruct(), plain.reconstruct())
    assert torch.allclose(result.core.abs(), torch.diag(plain.s), atol=1e-12)
    assert float(result.error) == pytest.approx(float(plain.error))


def test_large_matrix_is_sampled(known, check):
    a = known(400, 300, 0.9 ** np.arange(200)).float()
    check(a, 10, slack=1.01 / math.sqrt(2))


def test_hosvd_factors_are_nested_and_its_core_has_orthogonal_slices(smooth):
    t = smooth(6, 7, 8)
    small, large = tucker(t, 2, method="hosvd"), tucker(t, 5, method="hosvd")
    assert torch.allclose(small.core, large.core[:2, :2, :2])
    full = multilinear_product(t, [svd(unfold(t, d)).u.T for d in range(3)])
    assert torch.allclose(full[:5, :5, :5], large.core)
    for d in range(3):
        gram = unfold(full, d) @ unfold(full, d).T
        assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_hooi_improves_sweep_by_sweep_on_both_starts(seed, dtype, gaussian, check):
    t = gaussian(6, 7, 8, seed=seed).to(dtype)
    errors = [float(check(t, (2, 3, 2), method=method).error) for method in ("sthosvd", "hosvd")]
    sweeps = [float(tucker(t, (2, 3, 2), method="hooi", tol=1e-12, max_sweeps=k).error) for k in (1, 2, 3, 10, 100)]
    slack = 1 + 10 * torch.finfo(dtype).eps
    assert sweeps[0] <= min(errors) * slack
    assert all(later <= earlier * slack for earlier, later in itertools.pairwise(sweeps))
    assert sweeps[-1] < 0.999 * min(errors)  # on Gaussian tensors there is always something to gain


def test_hooi_ends_in_a_stationary_point(gaussian):
    t = gaussian(5, 6, 7)
    result = tucker(t, 2, method="hooi", tol=1e-14, max_sweeps=1000)
    for d in range(3):  # no mode can be improved with the others fixed
        others = multilinear_product(t, [None if e == d else u.T for e, u in enumerate(result.factors)])
        best = svd(unfold(others, d)).s[:2].square().sum()
        assert float(result.core.square().sum()) == pytest.approx(float(best), rel=1e-9)


@pytest.mark.parametrize("driver", ["exact", "gram", "randomized", "lanczos"])
def test_every_driver(driver, smooth, check):
    check(smooth(6, 7, 8), 3, slack=1.01, rounding=1e-7, driver=driver)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype, smooth, check):
    assert check(smooth(6, 7, 8).to(dtype), 3).core.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_scale_of_the_tensor_is_that_of_the_core(factor, method, smooth):
    t = smooth(5, 6, 7).float()
    plain, scaled = tucker(t, 2, method=method), tucker(t * factor, 2, method=method)
    assert torch.allclose(scaled.core.double() / factor, plain.core.double(), atol=1e-5)
    assert float(scaled.error) / factor == pytest.approx(float(plain.error), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_degenerate_tensors(method, gaussian, check):
    for t, ranks in [
        (torch.zeros(3, 4, 5), 2),
        (torch.ones(1, 1, 1), 1),
        (gaussian(1, 6, 1), 3),
        (gaussian(2, 2, 30), (2, 2, 20)),  # 20 is more than the unfolding can have
        (gaussian(5, 4, 3).permute(2, 0, 1)[:, ::2], 2),
        (torch.ones(4, 5, 6), 3),
    ]:
        check(t, ranks, method=method)


def test_result_repeats_and_input_is_unchanged(gaussian):
    t = gaussian(300, 280).float().requires_grad_()
    before = t.detach().clone()
    first, second = tucker(t, 4), tucker(t, 4)
    assert torch.equal(first.core, second.core)
    assert not first.core.requires_grad
    assert torch.equal(t.detach(), before)
    assert not torch.equal(tucker(t, 4, generator=torch.Generator().manual_seed(5)).core, first.core)


def test_trained_factors_have_gradients(smooth):
    result = tucker(smooth(4, 5, 6), 2)
    core = result.core.clone().requires_grad_()
    result._replace(core=core).reconstruct().sum().backward()
    assert core.grad is not None
    assert core.grad.shape == core.shape


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ranks": 0}, ValueError, "ranks must be at least 1, not 0"),
        ({"ranks": (2, 2, 0)}, ValueError, r"ranks\[2\] must be at least 1, not 0"),
        ({"ranks": (2, 2)}, ValueError, "ranks has 2 entries; give 3, one for each mode"),
        ({"ranks": 2, "method": "als"}, ValueError, "method must be one of sthosvd, hosvd, hooi, not 'als'"),
        ({"ranks": 2, "tol": 0}, ValueError, "must be positive"),
        ({"ranks": 2, "max_sweeps": 0}, ValueError, "must be positive"),
        ({"ranks": 2, "driver": "magic"}, ValueError, "driver must be one of"),
        ({"ranks": 2, "t": torch.full((2, 3), torch.nan)}, LinalgError, r"t: shape \(2, 3\).*contains NaN or Inf"),
        ({"ranks": 2, "t": torch.ones(2, 3) * torch.inf}, LinalgError, "contains NaN or Inf"),
        ({"ranks": 2, "t": torch.ones(2, 3, dtype=torch.int32)}, LinalgError, "int32: is not real floating point"),
        ({"ranks": 2, "t": torch.ones(2, 0, 3)}, LinalgError, "no tensor with entries"),
        ({"ranks": 2, "t": torch.ones(())}, LinalgError, "no tensor with entries"),
    ],
)
def test_what_cannot_be_done_is_said(options, error, message, gaussian):
    with pytest.raises(error, match=message):
        tucker(**({"t": gaussian(3, 4, 5)} | options))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    ranks=st.lists(st.integers(1, 7), min_size=4, max_size=4),
    method=st.sampled_from(METHODS),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    decimals=st.sampled_from([0, 8]),
    seed=st.integers(0, 99),
)
def test_laws_for_any_tensor(shape, ranks, method, dtype, decimals, seed, smooth, check):
    # few decimals make ties, zeros and dependent slices common
    check(smooth(*shape, seed=seed).round(decimals=decimals).to(dtype), ranks[: len(shape)], method=method)
