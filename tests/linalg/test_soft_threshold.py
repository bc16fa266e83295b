"""The thresholds are the minimisers that they claim to be, and leave the input alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg.errors import LinalgError
from eckart.linalg.soft_threshold import hard_threshold, singular_value_threshold, soft_threshold

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    tau=st.sampled_from([0.0, 0.3, 1.0, 50.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
def test_soft_threshold_is_the_formula(shape, tau, dtype, seed):
    a = gaussian(*shape, seed=seed).to(dtype)
    x = a.double().numpy()
    expected = np.sign(x) * np.maximum(np.abs(x) - tau, 0)
    result = soft_threshold(a, tau)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # one subtraction, rounded once
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=1e-6, atol=1e-6)


def test_soft_threshold_takes_a_threshold_for_each_entry():
    a, tau = gaussian(4, 5), gaussian(4, 1, seed=1).abs()
    rows = [soft_threshold(row, float(t)) for row, t in zip(a, tau, strict=True)]
    assert torch.equal(soft_threshold(a, tau), torch.stack(rows))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    count=st.integers(0, 40),
    dim=st.sampled_from([None, -1, -2]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
def test_hard_threshold_keeps_the_largest(shape, count, dim, dtype, seed):
    a = gaussian(*shape, seed=seed).mul(4).round().to(dtype)  # integers: ties are the rule
    result = hard_threshold(a, count, dim=dim)
    slices = (-2, -1) if dim is None else dim
    assert bool(((result != 0).sum(dim=slices) <= count).all())
    assert bool(((result == 0) | (result == a)).all())
    flat = a.double().abs().flatten(-2) if dim is None else a.double().abs().movedim(dim, -1)
    best = flat.sort(dim=-1, descending=True).values[..., :count].sum(dim=-1)  # sums of small integers: exact
    assert torch.equal(result.double().abs().sum(dim=slices), best)


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_thresholds_keep_their_scale(scale, dtype):
    a = (gaussian(6, 5) * scale).to(dtype)
    kept = hard_threshold(a, 7)
    assert torch.equal(kept[kept != 0], a[kept != 0])
    assert int((kept != 0).sum()) == 7
    small, large = singular_value_threshold(gaussian(6, 5).to(dtype), 1.0), singular_value_threshold(a, scale)
    torch.testing.assert_close(large.s / scale, small.s, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(large.error / scale, small.error, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    tau=st.sampled_from([0.0, 0.5, 2.0, 100.0]),
    guess=st.sampled_from([None, 0, 1, 5, 50]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
def test_singular_value_threshold_is_the_formula(m, n, tau, guess, dtype, seed):
    a = gaussian(m, n, seed=seed).to(dtype)
    u, s, vh = np.linalg.svd(a.double().numpy(), full_matrices=False)
    expected = (u * np.maximum(s - tau, 0)) @ vh
    result = singular_value_threshold(a, tau, guess=guess)
    # rounding of an SVD in the working precision, times s_1 < 10; at tau = 0 a Gram of float32 is good to 1e-7
    np.testing.assert_allclose(result.reconstruct().double().numpy(), expected, atol=3e-5)
    assert bool((result.s > 0).all())
    assert result.rank <= int((s > tau).sum()) + (dtype != torch.float64)
    np.testing.assert_allclose(float(result.error), np.linalg.norm(np.minimum(s, tau)), atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_only_the_triplets_above_the_threshold_are_needed(known, dtype):
    """300 x 280 with 9 values above tau, from guesses far too small, right and far too large."""
    s = np.concatenate([np.linspace(20, 10, 9), np.full(271, 0.5)])
    a = known(300, 280, s).to(dtype)
    for guess in (0, 3, 9, 60, None):
        result = singular_value_threshold(a, 5.0, guess=guess)
        # Lanczos promises residuals of 1e-5 s_1 in float32; values err by the square of that, rounding adds 1e-6
        np.testing.assert_allclose(result.s.double().numpy(), s[:9] - 5, atol=2e-5)
        np.testing.assert_allclose(float(result.error), np.sqrt(9 * 25 + 271 * 0.25), rtol=1e-6)


def test_batch_is_filled_up_with_zeros():
    a = torch.stack([torch.diag(torch.tensor([5.0, 4.0, 3.0])), torch.diag(torch.tensor([9.0, 1.0, 1.0]))])
    result = singular_value_threshold(a, torch.tensor([1.0, 2.0]))
    assert result.s.tolist() == [[4.0, 3.0, 2.0], [7.0, 0.0, 0.0]]
    for matrix, tau, low in zip(a, (1.0, 2.0), result.reconstruct(), strict=True):
        torch.testing.assert_close(singular_value_threshold(matrix, tau).reconstruct(), low)


def test_input_is_unchanged_and_detached():
    a = gaussian(4, 4).requires_grad_()
    before = a.detach().clone()
    for result in (soft_threshold(a, 0.1), hard_threshold(a, 16), singular_value_threshold(a, 0.1).u):
        assert not result.requires_grad
        result.zero_()
    assert torch.equal(a.detach(), before)


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (2, 0, 0)])
def test_empty(shape):
    a = torch.zeros(shape)
    assert hard_threshold(a, 3).shape == shape
    assert singular_value_threshold(a, 1.0).reconstruct().shape == shape


def test_messages():
    a = torch.zeros(2, 2)
    for call in (soft_threshold, singular_value_threshold):
        for tau in (-1.0, float("nan"), torch.tensor(-1.0)):
            with pytest.raises(ValueError, match="tau must be finite and at least 0"):
                call(a, tau)
        with pytest.raises(LinalgError, match="contains NaN or Inf"):
            call(a / 0, 1.0)
        with pytest.raises(LinalgError, match="is not real floating point"):
            call(a.long(), 1.0)
    with pytest.raises(ValueError, match="count must be at least 0"):
        hard_threshold(a, -1)
    with pytest.raises(LinalgError, match="is not a matrix"):
        hard_threshold(a[0], 1)
    with pytest.raises(LinalgError, match="contains NaN or Inf"):
        hard_threshold(a / 0, 1)
    with pytest.raises(ValueError, match="guess must be at least 0"):
        singular_value_threshold(a, 1.0, guess=-1)
