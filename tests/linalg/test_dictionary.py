"""Dictionaries: planted ones are found, low rank is the special case, and the error never rises."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg.dictionary import dictionary
from eckart.linalg.errors import LinalgError
from eckart.linalg.pursuit import orthogonal_matching_pursuit

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def union_of_subspaces(m: int, dimension: int, count: int, n: int, seed: int = 0) -> torch.Tensor:
    """n columns, each from one of ``count`` random subspaces, in random order."""
    rng = np.random.default_rng(seed)
    bases = rng.standard_normal((count, m, dimension))
    which = rng.permutation(n) % count
    return torch.from_numpy(np.stack([bases[i] @ rng.standard_normal(dimension) for i in which], axis=1))


def best_error(w: torch.Tensor, rank: int) -> float:
    return float(np.sqrt((np.linalg.svd(w.double().numpy(), compute_uv=False)[rank:] ** 2).sum()))


def true_error(w: torch.Tensor, result) -> float:
    return float((w.double() - result.atoms.double() @ result.codes.dense().double()).norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_union_of_subspaces_is_met_where_low_rank_fails(dtype):
    w = union_of_subspaces(64, 8, 4, 256).to(dtype)
    result = dictionary(w, atoms=32, sparsity=8)
    rank = result.nbytes(16) // (2 * (64 + 256)) + 1  # what low rank may store instead, rounded up
    assert rank < 20
    assert best_error(w, rank) > 0.4 * float(w.norm())
    assert float(result.error) < 1e-5 * float(w.norm())


def test_noise_on_the_union_is_all_that_is_left():
    clean = union_of_subspaces(64, 8, 4, 256)
    noise = gaussian(64, 256, seed=5)
    noise *= 0.05 * clean.norm() / noise.norm()
    result = dictionary(clean + noise, atoms=32, sparsity=8)
    assert float(result.error) < 1.5 * float(noise.norm())


def test_one_subspace_ties_with_the_svd():
    w = union_of_subspaces(64, 8, 1, 100)
    assert float(dictionary(w, atoms=8, sparsity=8).error) < 1e-12 * float(w.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_atoms_are_the_truncated_svd(dtype):
    w = gaussian(30, 40).to(dtype)
    for k in (1, 7, 30):
        # two roundings of a norm of 35; nothing is left at k = 30
        np.testing.assert_allclose(float(dictionary(w, k, k).error), best_error(w, k), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(("m", "n", "k", "s"), [(30, 60, 20, 5), (16, 80, 40, 4), (40, 30, 10, 3)])
def test_no_sweep_raises_the_error(m, n, k, s):
    w = gaussian(m, n)
    errors = [float(dictionary(w, k, s, sweeps=sweeps).error) for sweeps in range(7)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.98 * errors[0]
    assert errors[0] <= best_error(w, s)


@pytest.mark.parametrize(("m", "n", "k", "s"), [(30, 60, 20, 5), (16, 80, 40, 4), (40, 30, 10, 3), (20, 50, 12, 12)])
@pytest.mark.parametrize("steps", [1, 3])
def test_no_sweep_with_pursuit_in_steps_raises_the_error(m, n, k, s, steps):
    w = gaussian(m, n)
    results = [dictionary(w, k, s, sweeps=sweeps, steps=steps) for sweeps in range(7)]
    errors = [float(result.error) for result in results]
    for before, after in pairwise(errors):
        assert after <= before * (1 + 1e-12)
    np.testing.assert_allclose(errors, [true_error(w, result) for result in results], rtol=1e-10)
    if s == k:  # all atoms, the truncated SVD
        np.testing.assert_allclose(errors, best_error(w, k), rtol=1e-10)
    else:
        assert errors[-1] < 0.98 * errors[0]
    if steps == 3:  # not much worse than one atom at a time
        assert errors[-1] < 1.1 * float(dictionary(w, k, s, sweeps=6).error)


def test_gain_shape_quantiser():
    """s = 1: every column on one of k lines, which is found when the lines are far apart."""
    rng = np.random.default_rng(0)
    lines = np.linalg.qr(rng.standard_normal((12, 5)))[0]
    which = rng.integers(5, size=80)
    w = torch.from_numpy(lines[:, which] * rng.standard_normal(80))
    result = dictionary(w, atoms=5, sparsity=1)
    assert float(result.error) < 1e-12
    np.testing.assert_allclose(np.abs(result.atoms.numpy().T @ lines).max(axis=0), 1.0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 16)),
    k=st.integers(1, 20),
    s=st.integers(1, 20),
    decay=st.sampled_from([0.0, 0.5, 3.0]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 1e30, 1e-30]),
    seed=st.integers(0, 10**6),
)
def test_laws(shape, k, s, decay, dtype, scale, seed):
    m, n = shape
    if dtype in (torch.bfloat16, torch.float16):
        scale = 1.0
    rows = torch.exp(-decay * torch.arange(m, dtype=torch.float64))[:, None]
    w = (gaussian(m, n, seed=seed) * rows * scale).to(dtype)
    before = w.clone()
    result = dictionary(w, k, s, sweeps=3)
    assert torch.equal(w, before)
    k = min(k, n)
    s = min(s, m, k)
    assert result.atoms.shape == (m, k)
    assert result.codes.values.shape == result.codes.indices.shape == (n, s)
    assert result.reconstruct().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool(((result.codes.dense() != 0).sum(dim=0) <= s).all())
    lengths = result.atoms.double().norm(dim=0)
    assert bool(((lengths - 1).abs() < 1e-5).logical_or(lengths == 0).all())
    norm = float(w.double().norm()) + 1e-300
    assert abs(float(result.error) - true_error(w, result)) <= 1e-5 * norm
    if k <= min(m, n):
        assert float(result.error) <= best_error(w / scale, s) * scale + 1e-5 * norm


@pytest.mark.parametrize(("k", "s"), [(10, 3), (30, 2)])
def test_every_column_is_a_least_squares_fit(k, s):
    w = gaussian(20, 50)
    result = dictionary(w, k, s)
    left = w - result.reconstruct()
    used = result.codes.dense() != 0
    assert float((result.atoms.T @ left)[used].abs().max()) < 1e-10


def test_dead_atoms_come_back_to_life():
    """Atoms far from every column have no users; the worst-fit columns take their places."""
    w = torch.cat([gaussian(6, 30), torch.zeros(2, 30, dtype=torch.float64)])
    start = torch.zeros(8, 6, dtype=torch.float64)
    start[0, 0] = start[1, 1] = start[6, 2] = start[7, 3] = start[6, 4] = start[7, 5] = 1
    assert int((dictionary(w, 6, 2, sweeps=0, start=start).codes.dense() != 0).any(dim=1).sum()) == 2
    result = dictionary(w, 6, 2, sweeps=5, start=start)
    assert bool((result.codes.dense() != 0).any(dim=1).all())


def test_start_is_used_and_may_have_any_length():
    w, start = gaussian(10, 30), gaussian(10, 8, seed=1)
    result = dictionary(w, 8, 3, sweeps=0, start=start * 1e20)
    torch.testing.assert_close(result.atoms, start / start.norm(dim=0))
    assert float(result.error) <= float(orthogonal_matching_pursuit(start, w, 3).error) * (1 + 1e-12)
    resumed = dictionary(w, 8, 3, sweeps=2, start=dictionary(w, 8, 3, sweeps=2).atoms)
    assert float(resumed.error) <= float(dictionary(w, 8, 3, sweeps=2).error)


def test_overcomplete_dictionaries_draw_from_the_generator():
    w = gaussian(8, 60)
    state = torch.random.get_rng_state()
    one, two = dictionary(w, 24, 2, sweeps=1), dictionary(w, 24, 2, sweeps=1)
    assert torch.equal(one.atoms, two.atoms)
    other = dictionary(w, 24, 2, sweeps=1, generator=torch.Generator().manual_seed(7))
    assert not torch.equal(one.atoms, other.atoms)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert float(one.error) < float(dictionary(w, 8, 2, sweeps=1).error)


def test_batch_equals_loop():
    w = gaussian(2, 2, 10, 16)
    result = dictionary(w, 12, 3, sweeps=2)
    for i in range(2):
        for j in range(2):
            one = dictionary(w[i, j], 12, 3, sweeps=2)
            assert torch.equal(one.reconstruct(), result.reconstruct()[i, j])
            assert torch.equal(one.error, result.error[i, j])
    assert result.nbytes() == 4 * dictionary(w[0, 0], 12, 3, sweeps=2).nbytes()


@pytest.mark.parametrize(("m", "n", "k", "s"), [(32, 48, 16, 8), (20, 30, 16, 2), (24, 24, 12, 12), (10, 9, 7, 1)])
def test_stored_bytes_are_those_of_the_packed_tensors(m, n, k, s):
    result = dictionary(gaussian(m, n), k, s, sweeps=1)
    assert result.num_parameters() == m * k + s * n
    mask = np.packbits((result.codes.dense() != 0).numpy()).size  # exact: every code has s nonzeros here
    index = -(-n * s * int(np.ceil(np.log2(k))) // 8)
    positions = 0 if s == k else min(mask, index)
    assert result.nbytes(16) == 2 * (m * k + s * n) + positions
    if positions == mask:
        assert result.nbytes(16) == -(-2 * (m * k + s * n + k * n / 16) // 1)  # the formula of CoSpaDi, in 16-bit words


@pytest.mark.parametrize(
    "w",
    [torch.zeros(6, 8), torch.ones(6, 8), gaussian(1, 8), gaussian(8, 1), gaussian(8, 6).T, gaussian(12, 16)[::2, ::2]],
    ids=["zero", "rank one", "one row", "one column", "transposed", "strided"],
)
def test_degenerate(w):
    result = dictionary(w, 4, 2)
    assert bool(result.reconstruct().isfinite().all())
    assert abs(float(result.error) - true_error(w, result)) <= 1e-6 * (float(w.norm()) + 1e-30)
    assert float(result.error) <= best_error(w, 2) + 1e-6 * float(w.norm())


def test_messages():
    w = gaussian(6, 8)
    for k, s in ((0, 1), (3, 0)):
        with pytest.raises(ValueError, match="atoms and sparsity must be at least 1"):
            dictionary(w, k, s)
    with pytest.raises(ValueError, match="sweeps must be at least 0"):
        dictionary(w, 3, 1, sweeps=-1)
    with pytest.raises(ValueError, match="steps must be at least 1, not 0; leave it out"):
        dictionary(w, 3, 1, steps=0)
    for empty in (w[:0], w[:, :0]):
        with pytest.raises(LinalgError, match=r"^w: .*is empty"):
            dictionary(empty, 3, 1)
    with pytest.raises(LinalgError, match=r"^w: .*NaN or Inf"):
        dictionary(w / 0, 3, 1)
    for vector in (w[0], w[0, 0]):
        with pytest.raises(LinalgError, match=r"^w: .*is not a matrix"):
            dictionary(vector, 3, 1)
    with pytest.raises(LinalgError, match=r"start: .*give it the shape \(6, 3\)"):
        dictionary(w, 3, 1, start=gaussian(6, 4))
