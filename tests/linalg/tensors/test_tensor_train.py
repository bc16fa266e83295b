"""tensor_train: bounds from the singular values of the unfoldings at every bond, which numpy works out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError, svd
from eckart.linalg.tensors.tensor_train import TensorTrain, tensor_train

DTYPES = [torch.float32, torch.float64]


def random_train(shape, ranks, gaussian, dtype=torch.float64):
    bonds = [1, *ranks, 1]
    cores = tuple(gaussian(bonds[k], n, bonds[k + 1], seed=k).to(dtype) for k, n in enumerate(shape))
    return TensorTrain(cores, torch.zeros((), dtype=torch.float64))


@pytest.fixture(scope="module")
def check(tail, distance):
    """check(t, ranks, ...) -> the result, after every law of a tensor train was tested on it."""

    def verify(t, ranks=None, tol=None, slack=1.0, rounding=None, result=None, **options):
        result = result or tensor_train(t, ranks, tol=tol, **options)
        size = float(t.double().norm())
        rounding = rounding or 50 * torch.finfo(result.cores[0].dtype).eps
        assert result.shape == t.shape
        assert result.cores[0].shape[0] == result.cores[-1].shape[2] == 1
        assert result.error.dtype == torch.float64
        assert result.parameters == sum(core.numel() for core in result.cores)
        for core in result.cores[:-1]:
            wide = core.double().flatten(0, 1)
            assert torch.allclose(wide.T @ wide, torch.eye(wide.shape[1]).double(), atol=rounding)
        made = distance(t, result.reconstruct())
        assert float(result.error) == pytest.approx(made, rel=1e-3, abs=rounding * size)
        if ranks is not None:
            caps = [ranks] * (t.ndim - 1) if isinstance(ranks, int) else ranks
            assert all(r <= cap for r, cap in zip(result.ranks, caps, strict=True))
        if tol is not None and ranks is None:
            assert made <= tol * size + rounding * size
        # the best train of these ranks has at least the largest tail, TT-SVD at most the root of the sum of squares
        tails = [tail(t.flatten(0, k).flatten(1), r) for k, r in enumerate(result.ranks)]
        assert made <= slack * math.hypot(0, *tails) + rounding * size
        assert made >= max([0, *tails]) - rounding * size
        return result

    return verify


CASES = [((7,), None), ((9, 6), 3), ((6, 7, 8), (2, 4)), ((5, 6, 4, 3), 3), ((3, 2, 4, 2, 3), (2, 4, 3, 1))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "ranks"), CASES, ids=str)
def test_error_is_within_the_bounds(shape, ranks, dtype, smooth, check):
    check(smooth(*shape).to(dtype), ranks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tol", [0.5, 0.1, 1e-2, 1e-4])
def test_tolerance_is_kept_and_used(tol, dtype, smooth, check):
    t = smooth(6, 7, 8, 5).to(dtype)
    result = check(t, tol=tol)
    # spectra that halve: a rank that could be one lower everywhere would mean that the error is wasted
    assert float(result.error) > tol * float(t.norm()) / 20
    capped = check(t, 2, tol=tol)
    assert all(r <= min(2, full) for r, full in zip(capped.ranks, result.ranks, strict=True))


def test_unused_tolerance_goes_to_later_bonds():
    t = torch.zeros(3, 3, 3, dtype=torch.float64)
    t[range(3), range(3), range(3)] = torch.tensor([1.0, 1.0, 0.1]).double()
    # Without the 0.1 the error is 0.0705: above the first bond's 0.08 / sqrt(2), so the second has all of 0.08.
    assert tensor_train(t, tol=0.08).ranks == (3, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_known_ranks_are_recovered(dtype, gaussian, check):
    t = random_train((6, 5, 4, 5), (2, 3, 4), gaussian, dtype).reconstruct()
    tol = 1e-4 if dtype == torch.float32 else 1e-10
    assert check(t, tol=tol).ranks == (2, 3, 4)
    assert float(check(t, (2, 3, 4)).error) < 50 * torch.finfo(dtype).eps * float(t.norm())


def test_a_sum_has_ranks_two(check):
    x = torch.linspace(0, 1, 9, dtype=torch.float64)
    t = torch.sin(x[:, None, None, None] + x[:, None, None] + x[:, None] + x)
    assert check(t, tol=1e-12).ranks == (2, 2, 2)


def test_without_limits_nothing_is_lost(gaussian, check):
    t = gaussian(4, 3, 2, 5)
    result = check(t)
    assert result.ranks == (4, 10, 5)
    assert float(result.error) < 1e-13


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_order_two_is_the_truncated_svd(shape, gaussian):
    a = gaussian(*shape)
    result, plain = tensor_train(a, 4), svd(a, 4)
    assert torch.allclose(result.reconstruct(), plain.reconstruct())
    assert float(result.error) == pytest.approx(float(plain.error))


def test_large_matrix_is_sampled(known, check):
    check(known(400, 300, 0.9 ** np.arange(200)).float(), 10, slack=1.01)


@pytest.mark.parametrize("driver", ["exact", "gram", "randomized", "lanczos"])
def test_every_driver(driver, smooth, check):
    check(smooth(6, 7, 8), 3, slack=1.01, rounding=1e-7, driver=driver)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_decomposing_again(dtype, smooth, check):
    t = smooth(5, 6, 7, 4).to(dtype)
    train = tensor_train(t)
    for options in ({"ranks": 2}, {"ranks": (2, 3, 1)}, {"tol": 0.05}, {"ranks": 3, "tol": 0.01}, {}):
        rounded = check(t, **options, result=train.round(**options))
        again = tensor_train(t, **options)
        assert rounded.ranks == again.ranks
        atol = 1e3 * torch.finfo(dtype).eps * float(t.norm())
        assert torch.allclose(rounded.reconstruct(), again.reconstruct(), atol=atol)
        assert float(rounded.error) == pytest.approx(float(again.error), rel=1e-3, abs=atol)


def test_rounding_takes_out_redundant_ranks(gaussian, distance):
    train = random_train((4, 5, 6), (2, 3), gaussian)
    doubled = TensorTrain(
        (
            torch.cat([train.cores[0]] * 2, dim=2),
            torch.stack([torch.block_diag(*[train.cores[1][:, i]] * 2) for i in range(5)], dim=1),
            torch.cat([train.cores[2]] * 2, dim=0),
        ),
        train.error,
    )
    assert distance(doubled.reconstruct(), 2 * train.reconstruct()) < 1e-12
    rounded = doubled.round(tol=1e-10)
    assert rounded.ranks == (2, 3)
    assert distance(doubled.reconstruct(), rounded.reconstruct()) < 1e-10
    assert float(rounded.error) < 1e-10


@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_scale_of_the_tensor_is_that_of_the_last_core(factor, smooth):
    t = smooth(5, 6, 7).float()
    plain, scaled = tensor_train(t, 2), tensor_train(t * factor, 2)
    assert torch.allclose(scaled.cores[-1].double() / factor, plain.cores[-1].double(), atol=1e-5)
    assert float(scaled.error) / factor == pytest.approx(float(plain.error), rel=1e-4)
    rounded = scaled.round(1)
    assert torch.allclose(
        rounded.reconstruct().double() / factor, tensor_train(t, 1).reconstruct().double(), atol=0.05 * float(t.norm())
    )
    assert float(rounded.error) / factor == pytest.approx(float(plain.round(1).error), rel=1e-4)


def test_rounding_survives_cores_of_wild_scale(gaussian, distance):
    train = random_train((4, 5, 6), (2, 3), gaussian, torch.float32)
    wild = train._replace(cores=(train.cores[0] * 1e25, train.cores[1] * 1e-30, train.cores[2] * 1e5))
    assert distance(wild.round(tol=1e-5).reconstruct(), train.reconstruct()) < 1e-4 * float(train.reconstruct().norm())
    zero = train._replace(cores=(train.cores[0], train.cores[1] * 0, train.cores[2])).round(2)
    assert float(zero.error) == 0
    assert float(zero.reconstruct().abs().max()) == 0


def test_degenerate_tensors(gaussian, check):
    for t, options in [
        (torch.zeros(3, 4, 5), {"ranks": 2}),
        (torch.zeros(3, 4, 5), {"tol": 0.1}),
        (torch.ones(1, 1, 1), {"ranks": 1}),
        (gaussian(1, 6, 1), {"ranks": 3}),
        (gaussian(5, 4, 3).permute(2, 0, 1)[:, ::2], {"ranks": 2}),
        (torch.ones(4, 5, 6), {"tol": 1e-5}),
        (gaussian(4, 5).bfloat16(), {"ranks": 2}),
    ]:
        result = check(t, **options)
        assert result.cores[0].dtype == (torch.float64 if t.dtype == torch.float64 else torch.float32)
    assert tensor_train(torch.ones(4, 5, 6), tol=1e-5).ranks == (1, 1)


def test_result_repeats_and_input_is_unchanged(gaussian):
    t = gaussian(300, 280).float().requires_grad_()
    before = t.detach().clone()
    first, second = tensor_train(t, 4), tensor_train(t, 4)
    assert torch.equal(first.cores[0], second.cores[0])
    assert torch.equal(t.detach(), before)
    assert not torch.equal(tensor_train(t, 4, generator=torch.Generator().manual_seed(5)).cores[0], first.cores[0])


def test_trained_cores_have_gradients(gaussian):
    train = random_train((3, 4, 5), (2, 2), gaussian)
    cores = tuple(core.requires_grad_() for core in train.cores)
    train._replace(cores=cores).reconstruct().sum().backward()
    assert all(core.grad is not None for core in cores)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ranks": 0}, ValueError, "ranks must be at least 1, not 0"),
        ({"ranks": (2, 0)}, ValueError, r"ranks\[1\] must be at least 1, not 0"),
        ({"ranks": (2, 2, 2)}, ValueError, "ranks has 3 entries; give 2, one for each bond"),
        ({"tol": 0.0}, ValueError, "tol must be positive"),
        ({"tol": float("nan")}, ValueError, "tol must be positive"),
        ({"ranks": 2, "driver": "magic"}, ValueError, "driver must be one of"),
        ({"t": torch.full((2, 3), torch.nan)}, LinalgError, r"\(2, 3\).*contains NaN or Inf"),
        ({"t": torch.ones(2, 0, 3)}, LinalgError, "no tensor with entries"),
    ],
)
def test_what_cannot_be_done_is_said(options, error, message, gaussian):
    t = options.pop("t", gaussian(3, 4, 5))
    with pytest.raises(error, match=message):
        tensor_train(t, **options)
    if error is ValueError and "driver" not in options:
        with pytest.raises(error, match=message):
            tensor_train(t).round(**options)


def test_rounding_names_the_bad_core(gaussian):
    train = random_train((3, 4), (2,), gaussian)
    with pytest.raises(LinalgError, match=r"cores\[1\].*NaN"):
        train._replace(cores=(train.cores[0], train.cores[1] / 0 * 0)).round(1)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    cap=st.one_of(st.none(), st.integers(1, 7)),
    tol=st.one_of(st.none(), st.sampled_from([0.3, 0.01])),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    decimals=st.sampled_from([0, 8]),
    seed=st.integers(0, 99),
)
def test_laws_for_any_tensor(shape, cap, tol, dtype, decimals, seed, smooth, check):
    t = smooth(*shape, seed=seed).round(decimals=decimals).to(dtype)
    train = check(t, cap, tol)
    check(train.reconstruct(), 2, result=train.round(2))
