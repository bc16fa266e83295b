"""Orthogonal matching pursuit against scikit-learn's, and against the best code where that is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp, orthogonal_mp_gram

import eckart.linalg.pursuit as module
from eckart.linalg.errors import LinalgError
from eckart.linalg.pursuit import SparseCodes, orthogonal_matching_pursuit

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def unit(m: int, k: int, seed: int = 0) -> torch.Tensor:
    d = gaussian(m, k, seed=seed)
    return d / d.norm(dim=0)


@pytest.mark.parametrize(("m", "k", "n", "s"), [(30, 20, 40, 5), (20, 50, 60, 8), (64, 32, 10, 32), (16, 16, 1, 1)])
def test_equals_scikit_learn(m, k, n, s):
    d, w = unit(m, k), gaussian(m, n, seed=1)
    codes = orthogonal_matching_pursuit(d, w, s)
    expected = orthogonal_mp(d.numpy(), w.numpy(), n_nonzero_coefs=s).reshape(k, n)
    gram = orthogonal_mp_gram((d.T @ d).numpy(), (d.T @ w).numpy(), n_nonzero_coefs=s).reshape(k, n)
    # the same supports, then least squares with a condition number below 1e4 (normal equations: its square)
    for oracle in (expected, gram):
        np.testing.assert_allclose(codes.dense().numpy(), oracle, atol=1e-8)


def generalized(d: np.ndarray, w: np.ndarray, s: int, steps: int) -> np.ndarray:
    """The textbook's gOMP, column by column, with an exact refit after every step."""
    codes = np.zeros((d.shape[1], w.shape[1]))
    for column in range(w.shape[1]):
        support: list[int] = []
        left = w[:, column]
        for step in range(steps):
            gains = np.abs(d.T @ left)
            gains[support] = -1
            support += list(np.argsort(-gains)[: -(-s * (step + 1) // steps) - len(support)])
            fit = np.linalg.lstsq(d[:, support], w[:, column], rcond=None)[0]
            left = w[:, column] - d[:, support] @ fit
        codes[support, column] = fit
    return codes


@pytest.mark.parametrize(("m", "k", "n", "s", "steps"), [(60, 20, 40, 6, 3), (40, 50, 30, 7, 4), (30, 20, 10, 5, 1)])
def test_a_pursuit_in_steps_is_the_generalised_one(m, k, n, s, steps):
    d, w = unit(m, k), gaussian(m, n, seed=1)
    codes = orthogonal_matching_pursuit(d, w, s, steps=steps)
    # Six iterations solve up to six unknowns exactly, so that the choices are those of exact refits.
    np.testing.assert_allclose(codes.dense().numpy(), generalized(d.numpy(), w.numpy(), s, steps), atol=1e-8)


def test_as_many_steps_as_atoms_are_the_plain_pursuit():
    d, w = unit(20, 30), gaussian(20, 50, seed=1)
    plain = orthogonal_matching_pursuit(d, w, 6)
    for steps in (6, 9):
        assert torch.equal(orthogonal_matching_pursuit(d, w, 6, steps=steps).dense(), plain.dense())
    few = orthogonal_matching_pursuit(d, w, 6, steps=2)
    assert float(plain.error) < float(few.error) < 1.2 * float(plain.error)


def test_a_pursuit_in_steps_survives_zero_columns_and_equal_atoms():
    d = unit(10, 8)
    d[:, 5] = d[:, 2]
    d[:, 7] = 0
    w = torch.stack([2 * d[:, 2], torch.zeros(10, dtype=torch.float64), gaussian(10)], dim=1)
    codes = orthogonal_matching_pursuit(d, w, 6, steps=2)
    assert bool(codes.values.isfinite().all())
    assert bool((codes.indices.sort(dim=1).values.diff(dim=1) > 0).all())
    left = w - d @ codes.dense()
    assert float(left[:, :2].norm()) < 1e-9
    assert float(codes.error) == pytest.approx(float(left.norm()))


def test_chunks_change_nothing(monkeypatch):
    d, w = unit(20, 30), gaussian(20, 50, seed=1)
    whole = orthogonal_matching_pursuit(d, w, 6)
    monkeypatch.setattr(module, "_CHUNK", 200)
    parts = orthogonal_matching_pursuit(d, w, 6)
    assert torch.equal(whole.indices, parts.indices)
    torch.testing.assert_close(whole.values, parts.values, rtol=1e-12, atol=1e-12)


def test_orthonormal_atoms_give_the_best_code():
    d, w = torch.linalg.qr(gaussian(24, 24))[0], gaussian(24, 30, seed=1)
    codes = orthogonal_matching_pursuit(d, w, 7)
    best = (d.T @ w).square().sort(dim=0).values[:-7].sum().sqrt()
    torch.testing.assert_close(codes.error, best)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 12),
    k=st.integers(1, 16),
    n=st.integers(1, 8),
    s=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 1e30, 1e-30]),
    seed=st.integers(0, 10**6),
)
def test_laws(m, k, n, s, dtype, scale, seed):
    if dtype in (torch.bfloat16, torch.float16):
        scale = 1.0
    # atoms of lengths over three decades, some of them zero or equal
    d = gaussian(m, k, seed=seed) * torch.logspace(-1, 2, k, dtype=torch.float64)
    d[:, :: max(2, k // 2)] = d[:, :1] * float(seed % 2)
    d, w = d.to(dtype), (gaussian(m, n, seed=seed + 1) * scale).to(dtype)
    codes = orthogonal_matching_pursuit(d, w, s)
    s = min(s, m, k)
    assert codes.values.shape == codes.indices.shape == (n, s)
    assert codes.dense().shape == (k, n)
    assert codes.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool((codes.indices.sort(dim=1).values.diff(dim=1) > 0).all())  # distinct
    left = (w.double() - d.double() @ codes.dense().double()) / scale
    norm = float(w.double().norm()) / scale
    # rounding of the codes in the working precision, which counts with the lengths of dependent atoms
    slack = (1e-8 if dtype == torch.float64 else 1e-4) * (norm + 1)
    assert abs(float(codes.error) / scale - float(left.norm())) <= slack
    assert float(left.norm()) <= norm + slack
    lengths = d.double().norm(dim=0).clamp(min=1e-300)
    correlations = (d.double() / lengths).T @ left
    used = codes.dense() != 0
    assert float(correlations[used].abs().max() if used.any() else 0.0) <= slack


def test_more_atoms_never_hurt_and_all_of_them_are_least_squares():
    d, w = unit(30, 12), gaussian(30, 20, seed=1)
    errors = [float(orthogonal_matching_pursuit(d, w, s).error) for s in range(1, 13)]
    assert errors == sorted(errors, reverse=True)
    best = np.linalg.norm(w.numpy() - d.numpy() @ np.linalg.lstsq(d.numpy(), w.numpy(), rcond=None)[0])
    np.testing.assert_allclose(errors[-1], best, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_columns_use_no_more_atoms_than_they_need(dtype):
    d = unit(20, 15).to(dtype)
    w = torch.stack([3 * d[:, 4], d[:, 2] - 2 * d[:, 9], torch.zeros(20, dtype=dtype)], dim=1)
    codes = orthogonal_matching_pursuit(d, w, 6)
    assert (codes.values != 0).sum(dim=1).tolist() == [1, 2, 0]
    # float32 input: two roundings of entries below 1
    assert float(codes.error) < (1e-14 if dtype == torch.float64 else 1e-6)


def test_batch_equals_loop_and_input_is_unchanged():
    d, w = gaussian(2, 3, 10, 7), gaussian(2, 3, 10, 5, seed=1)
    copies = d.clone(), w.clone()
    codes = orthogonal_matching_pursuit(d, w, 3)
    for i in range(2):
        for j in range(3):
            one = orthogonal_matching_pursuit(d[i, j], w[i, j], 3)
            assert torch.equal(one.indices, codes.indices[i, j])
            torch.testing.assert_close(one.dense(), codes.dense()[i, j])
            torch.testing.assert_close(one.error, codes.error[i, j])
    assert torch.equal(d, copies[0])
    assert torch.equal(w, copies[1])


@pytest.mark.parametrize(
    ("size", "s", "columns", "bits"),
    [(16, 2, 3, 3 * 8), (16, 5, 3, 3 * 16), (1000, 500, 2, 2 * 1000), (8, 8, 4, 0), (1, 1, 5, 0), (9, 1, 2, 2 * 4)],
)
def test_positions_take_the_cheaper_of_mask_and_indices(size, s, columns, bits):
    indices = torch.arange(s).expand(columns, s)
    codes = SparseCodes(torch.ones(columns, s), indices, size, torch.zeros(()))
    assert codes.position_bits() == bits


def test_messages():
    d, w = gaussian(4, 3), gaussian(4, 2)
    with pytest.raises(ValueError, match="sparsity must be at least 1"):
        orthogonal_matching_pursuit(d, w, 0)
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        orthogonal_matching_pursuit(d, w, 1, steps=0)
    for other in (gaussian(5, 2), gaussian(2, 4, 2), gaussian(4, 0)):
        with pytest.raises(LinalgError, match=r"does not fit d of shape \(4, 3\)"):
            orthogonal_matching_pursuit(d, other, 1)
    with pytest.raises(LinalgError, match=r"^d: .*NaN or Inf"):
        orthogonal_matching_pursuit(d / 0, w, 1)
    with pytest.raises(LinalgError, match=r"^w: .*NaN or Inf"):
        orthogonal_matching_pursuit(d, w * float("nan"), 1)
