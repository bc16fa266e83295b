"""N:M projections against all patterns; dense times sparse against the truncated SVD and against exact fits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg.errors import LinalgError
from eckart.linalg.semi_structured import dense_sparse, keep_n_of_m, n_of_m_mask

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def best_error(w: torch.Tensor, rank: int) -> float:
    return float(np.sqrt((np.linalg.svd(w.double().numpy(), compute_uv=False)[rank:] ** 2).sum()))


def true_error(w: torch.Tensor, result) -> float:
    return float((w.double() - result.atoms.double() @ result.codes.dense().double()).norm())


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    pattern=st.sampled_from([(2, 4), (1, 4), (4, 4), (0, 4), (1, 2), (3, 5), (1, 1), (2, 8)]),
    dim=st.sampled_from([-1, -2]),
    weighted=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
def test_every_group_keeps_the_best_of_all_patterns(shape, pattern, dim, weighted, dtype, seed):
    (n, m), sizes = pattern, list(shape)
    sizes[dim] *= m
    a = gaussian(*sizes, seed=seed).mul(2).round().to(dtype)  # ties and zeros are the rule
    weight = gaussian(*sizes[-2:], seed=seed + 1).square() if weighted else None
    mask = n_of_m_mask(a, n, m, dim=dim, weight=weight)
    groups = mask.movedim(dim, -1).unflatten(-1, (-1, m))
    assert bool((groups.sum(dim=-1) == n).all())
    importance = a.double().square() * (1.0 if weight is None else weight)
    choices = importance.movedim(dim, -1).unflatten(-1, (-1, m))
    best = torch.stack([choices[..., list(kept)].sum(dim=-1) for kept in itertools.combinations(range(m), n)])
    got = (choices * groups).sum(dim=-1)
    # a weighted score is one rounded product
    torch.testing.assert_close(got, best.amax(dim=0), rtol=1e-5, atol=1e-12)
    kept = keep_n_of_m(a, n, m, dim=dim, weight=weight)
    assert torch.equal(kept.double(), a.double() * mask)
    assert kept.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_two_of_four_by_hand_ties_go_to_the_first():
    a = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, -5.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0]])
    assert n_of_m_mask(a, 2, 4).int().tolist() == [[1, 1, 0, 0, 0, 1, 0, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-40])
def test_the_mask_does_not_depend_on_scale(scale):
    a, weight = gaussian(6, 16), gaussian(16, seed=1).square()
    expected = n_of_m_mask(a, 2, 4, weight=weight)
    assert torch.equal(n_of_m_mask((a * scale).float() if scale > 1e-35 else a * scale, 2, 4, weight=weight), expected)
    assert torch.equal(n_of_m_mask(a, 2, 4, weight=weight * scale), expected)


def check(w: torch.Tensor, result, inner: int, s: int, block: int) -> None:
    """The structure, the reported error, and that every column is a least-squares fit on its support."""
    m, n = w.shape
    codes = result.codes
    assert result.atoms.shape == (m, inner)
    assert codes.values.shape == (n, s)
    assert codes.indices.shape == (n // block, s)
    assert bool((codes.indices.sort(dim=1).values.diff(dim=1) > 0).all())
    norm = float(w.double().norm())
    eps = torch.finfo(result.atoms.dtype).eps
    # rounding of the factors, whose products add up to a few times the norm of w
    assert abs(float(result.error) - true_error(w, result)) <= 100 * eps * norm
    left = w.double() - result.reconstruct().double()
    correlations = (result.atoms.double().T @ left)[codes.dense() != 0]
    assert float(correlations.abs().max()) <= 1000 * eps * norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("block", [1, 4])
def test_structure_and_fit(dtype, block):
    w = gaussian(30, 40).to(dtype)
    check(w, dense_sparse(w, 16, nonzeros=5, block=block), 16, 5, block)
    result = dense_sparse(w, 16, n_of_m=(2, 4), block=block)
    check(w, result, 16, 8, block)
    groups = (result.codes.dense() != 0).unflatten(0, (-1, 4)).sum(dim=1)
    assert bool((groups == 2).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_nonzeros_are_the_truncated_svd(dtype):
    w = gaussian(30, 40).to(dtype)
    for options in ({"nonzeros": 12}, {"nonzeros": 12, "block": 8}, {"n_of_m": (4, 4)}):
        result = dense_sparse(w, 12, **options)
        # two roundings of a norm of 35
        np.testing.assert_allclose(float(result.error), best_error(w, 12), rtol=1e-6)


@pytest.mark.parametrize("options", [{"nonzeros": 6}, {"nonzeros": 6, "block": 4}, {"n_of_m": (2, 4)}])
def test_no_sweep_raises_the_error_and_rank_s_is_beaten(options):
    w = gaussian(40, 48) * 0.8 ** torch.arange(40)[:, None]  # the spectrum decays, so that it matters what is kept
    errors = [float(dense_sparse(w, 12, sweeps=sweeps, **options).error) for sweeps in range(7)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] <= best_error(w, 6)


def test_a_planted_factorisation_is_improved_from_a_start_near_it():
    d, support = gaussian(40, 10), gaussian(10, 60, seed=1).argsort(dim=0) < 2
    w = d @ (gaussian(10, 60, seed=2) * support)
    result = dense_sparse(w, 10, nonzeros=2, sweeps=30, start=d + 0.05 * gaussian(40, 10, seed=3))
    assert float(result.error) < 1e-5 * float(w.norm())


@pytest.mark.parametrize("block", [1, 4])
def test_a_given_support_is_kept_unless_another_is_better(block):
    d = gaussian(30, 10) + 2 * gaussian(30, 1, seed=1)  # atoms alike: the largest correlations mislead
    support = gaussian(40 // block, 10, seed=2).argsort(dim=1)[:, :3]
    mask = torch.zeros(40 // block, 10).scatter_(1, support, 1).repeat_interleave(block, dim=0).T
    w = d @ (gaussian(10, 40, seed=3) * mask)
    options = {"nonzeros": 3, "block": block, "sweeps": 0, "start": d}
    found = dense_sparse(w, 10, **options, support=support.to(torch.uint8))
    assert torch.equal(found.codes.indices.sort().values, support.sort().values)
    assert float(found.error) < 1e-9 * float(w.norm())
    assert float(dense_sparse(w, 10, **options).error) > 0.01 * float(w.norm())
    # The least correlated atoms are given up for better ones.
    worst = (d.T @ w).square().unflatten(1, (-1, block)).sum(2).topk(3, dim=0, largest=False).indices.T
    assert not torch.equal(dense_sparse(w, 10, **options, support=worst).codes.indices, worst)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 14),
    blocks=st.integers(1, 6),
    block=st.integers(1, 3),
    ranks=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    decay=st.sampled_from([0.0, 0.5, 3.0]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 1e30, 1e-30]),
    seed=st.integers(0, 10**6),
)
def test_laws(m, blocks, block, ranks, decay, dtype, scale, seed):
    n = blocks * block
    inner = min(max(ranks), m, n)
    s = min(min(ranks), inner)
    if dtype in (torch.bfloat16, torch.float16):
        scale = 1.0
    rows = torch.exp(-decay * torch.arange(m, dtype=torch.float64))[:, None]
    w = (gaussian(m, n, seed=seed) * rows * scale).to(dtype)
    before = w.clone()
    result = dense_sparse(w, inner, nonzeros=s, block=block, sweeps=3)
    assert torch.equal(w, before)
    assert result.error.dtype == torch.float64
    norm = float(w.double().norm()) + 1e-300
    assert abs(float(result.error) - true_error(w, result)) <= 1e-5 * norm
    assert float(result.error) <= best_error(w / scale, s) * scale + 1e-5 * norm
    assert result.reconstruct().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_batch_equals_loop_and_repeats():
    w = gaussian(2, 2, 12, 16)
    result = dense_sparse(w, 8, nonzeros=3, block=2)
    again = dense_sparse(w, 8, nonzeros=3, block=2)
    assert torch.equal(result.atoms, again.atoms)
    assert torch.equal(result.codes.values, again.codes.values)
    for i, j in itertools.product(range(2), range(2)):
        one = dense_sparse(w[i, j], 8, nonzeros=3, block=2)
        assert torch.equal(one.codes.indices, result.codes.indices[i, j])
        assert torch.equal(one.reconstruct(), result.reconstruct()[i, j])
        assert torch.equal(one.error, result.error[i, j])


@pytest.mark.parametrize(
    "w",
    [torch.zeros(6, 8), torch.ones(6, 8), gaussian(1, 8), gaussian(8, 6).T, gaussian(12, 16)[::2, ::2]],
    ids=["zero", "rank one", "one row", "transposed", "strided"],
)
def test_degenerate(w):
    inner = min(w.shape)
    result = dense_sparse(w, inner, nonzeros=1)
    assert bool(result.reconstruct().isfinite().all())
    assert abs(float(result.error) - true_error(w, result)) <= 1e-6 * (float(w.norm()) + 1e-30)
    assert float(result.error) <= best_error(w, 1) + 1e-6 * float(w.norm())


def test_stored_numbers():
    result = dense_sparse(gaussian(20, 24), 8, nonzeros=3, block=4)
    # n r + s m values and (m / c) s indices of 3 bits, in the letters of the paper
    assert result.num_parameters() == 20 * 8 + 3 * 24
    assert result.codes.indices.numel() == 24 // 4 * 3
    assert result.nbytes(16) == 2 * (20 * 8 + 3 * 24) + 24 // 4 * 8 // 8


def test_messages():
    w = gaussian(8, 12)
    for options in ({}, {"nonzeros": 2, "n_of_m": (2, 4)}):
        with pytest.raises(ValueError, match="give either nonzeros"):
            dense_sparse(w, 4, **options)
    with pytest.raises(ValueError, match="inner and block must be at least 1"):
        dense_sparse(w, 0, nonzeros=1)
    with pytest.raises(ValueError, match=r"inner must be at most min\(m, n\) = 8"):
        dense_sparse(w, 9, nonzeros=1)
    with pytest.raises(ValueError, match="nonzeros must be between 1 and inner = 4"):
        dense_sparse(w, 4, nonzeros=5)
    with pytest.raises(ValueError, match="M dividing inner = 6"):
        dense_sparse(w, 6, n_of_m=(2, 4))
    with pytest.raises(LinalgError, match="width that block = 5 does not divide"):
        dense_sparse(w, 4, nonzeros=1, block=5)
    with pytest.raises(LinalgError, match=r"start: .*give it the shape \(8, 4\)"):
        dense_sparse(w, 4, nonzeros=1, start=gaussian(8, 3))
    start, support = gaussian(8, 4), torch.zeros(12, 1, dtype=torch.int64)
    for wrong in ({"support": support}, {"start": start, "support": support[:5]}):
        with pytest.raises(
            LinalgError, match=r"support: .*give \(columns / block, 1\) integers for one w, and a start"
        ):
            dense_sparse(w, 4, nonzeros=1, **wrong)
    with pytest.raises(LinalgError, match="give integers from 0 to 3"):
        dense_sparse(w, 4, nonzeros=1, start=start, support=support + 4)
    for empty in (w[:0], w[:, :0]):
        with pytest.raises(LinalgError, match=r"^w: .*is empty"):
            dense_sparse(empty, 4, nonzeros=1)
    for vector in (w[0], w[0, 0]):
        with pytest.raises(LinalgError, match=r"^w: .*is not a matrix"):
            dense_sparse(vector, 4, nonzeros=1)
    with pytest.raises(LinalgError, match="NaN or Inf"):
        dense_sparse(w / 0, 4, nonzeros=1)
    with pytest.raises(ValueError, match="0 <= n <= m"):
        n_of_m_mask(w, 5, 4)
    with pytest.raises(LinalgError, match="dimension that 5 does not divide"):
        n_of_m_mask(w, 2, 5)
    for weight in (torch.ones(5), -torch.ones(12), torch.full((12,), float("nan"))):
        with pytest.raises(LinalgError, match="is no weight for a"):
            n_of_m_mask(w, 2, 4, weight=weight)
