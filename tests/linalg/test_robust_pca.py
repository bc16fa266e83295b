"""Low rank plus sparse: planted parts are found, the convex optimum is certified, the hard budget is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg.errors import LinalgError
from eckart.linalg.robust_pca import robust_pca

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def planted(m: int, n: int, rank: int, fraction: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Low rank with entries of size sqrt(rank), and a fraction of entries of size 5 sqrt(rank) of random sign."""
    rng = np.random.default_rng(seed)
    low = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))
    sparse = np.where(rng.random((m, n)) < fraction, rng.choice([-5.0, 5.0], (m, n)) * np.sqrt(rank), 0)
    return torch.from_numpy(low), torch.from_numpy(sparse)


def plain_pcp(a: np.ndarray, weight: float, steps: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Principal component pursuit with a penalty that never changes: slow and simple."""
    penalty = a.size / (4 * np.abs(a).sum())
    sparse, dual = np.zeros_like(a), np.zeros_like(a)
    for _ in range(steps):
        u, s, vh = np.linalg.svd(a - sparse + dual / penalty, full_matrices=False)
        low = (u * np.maximum(s - 1 / penalty, 0)) @ vh
        x = a - low + dual / penalty
        sparse = np.sign(x) * np.maximum(np.abs(x) - weight / penalty, 0)
        dual = dual + penalty * (a - low - sparse)
    return low, sparse


def cost(low: np.ndarray, sparse: np.ndarray, weight: float) -> float:
    return np.linalg.svd(low, compute_uv=False).sum() + weight * np.abs(sparse).sum()


def best_error(w: torch.Tensor, rank: int) -> float:
    return float(np.sqrt((np.linalg.svd(w.double().numpy(), compute_uv=False)[rank:] ** 2).sum()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("m", "n", "rank", "fraction"), [(80, 80, 4, 0.05), (60, 120, 3, 0.1), (300, 280, 5, 0.05)])
def test_pcp_recovers_both_parts(m, n, rank, fraction, dtype):
    low, sparse = planted(m, n, rank, fraction)
    result = robust_pca((low + sparse).to(dtype))
    assert bool(result.converged)
    assert result.low_rank.rank == rank
    assert torch.equal(result.sparse.abs() > 0.01, sparse != 0)
    # a few times the tolerance of the remainder
    tol = 1e-6 if dtype == torch.float64 else 1e-4
    assert float((result.low_rank.reconstruct() - low).norm()) < tol * float(low.norm())
    assert float((result.sparse - sparse).norm()) < tol * float(sparse.norm())


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("weight", [None, 0.1])
def test_pcp_satisfies_the_optimality_conditions(noise, weight):
    low, sparse = planted(50, 40, 3, 0.1)
    a = low + sparse + noise * torch.from_numpy(np.random.default_rng(1).standard_normal((50, 40)))
    result = robust_pca(a, sparse_weight=weight, tol=1e-9, max_iterations=5000)
    weight = weight or 1 / np.sqrt(50)
    assert bool(result.converged)
    dual, low, sparse = result.dual.numpy(), result.low_rank.reconstruct().numpy(), result.sparse.numpy()
    np.testing.assert_allclose(low + sparse, a.numpy(), atol=1e-6)
    assert np.linalg.norm(dual, 2) <= 1 + 1e-6
    assert np.abs(dual).max() <= weight * (1 + 1e-12)
    # Y is a subgradient of both norms, which with the above means that their sum is minimal
    np.testing.assert_allclose((dual * low).sum(), np.linalg.svd(low, compute_uv=False).sum(), rtol=1e-6)
    np.testing.assert_allclose((dual * sparse).sum(), weight * np.abs(sparse).sum(), rtol=1e-6)


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_pcp_is_no_further_from_optimal_than_the_tolerance(noise):
    low, sparse = planted(50, 40, 3, 0.1)
    a = low + sparse + noise * torch.from_numpy(np.random.default_rng(1).standard_normal((50, 40)))
    dual = robust_pca(a, tol=1e-3).dual.numpy()
    # the multiplier leaves the unit ball by 1.8 and 1.3 tolerances; if the remainder alone decided, by 4.0 and 3.3
    assert np.linalg.norm(dual, 2) <= 1 + 2e-3


def test_pcp_finds_the_optimum_that_a_plain_iteration_finds():
    rng = np.random.default_rng(3)
    a = planted(30, 20, 2, 0.1)[0].numpy() + rng.standard_normal((30, 20)) * (rng.random((30, 20)) < 0.5)
    low, sparse = plain_pcp(a, 1 / np.sqrt(30))
    result = robust_pca(torch.from_numpy(a), tol=1e-9, max_iterations=5000)
    np.testing.assert_allclose(result.low_rank.reconstruct().numpy(), low, atol=1e-6)
    np.testing.assert_allclose(result.sparse.numpy(), sparse, atol=1e-6)
    np.testing.assert_allclose(
        cost(result.low_rank.reconstruct().numpy(), result.sparse.numpy(), 1 / np.sqrt(30)),
        cost(low, sparse, 1 / np.sqrt(30)),
        rtol=1e-9,
    )


def test_pcp_fills_in_what_was_not_observed():
    low, sparse = planted(90, 90, 2, 0.05)
    observed = torch.from_numpy(np.random.default_rng(1).random((90, 90)) < 0.7)
    a = torch.where(observed, low + sparse, torch.nan)
    result = robust_pca(a, observed=observed)
    assert bool(result.converged)
    assert float((result.low_rank.reconstruct() - low).norm()) < 1e-5 * float(low.norm())
    assert torch.equal(result.mask, (sparse != 0) & observed)
    assert not bool(result.dual[~observed].any())
    left = torch.where(observed, low + sparse - result.reconstruct(), 0)
    torch.testing.assert_close(result.error, left.norm(), rtol=1e-6, atol=1e-12)
    everything = torch.ones_like(observed)
    assert torch.equal(robust_pca(low, observed=everything).sparse, robust_pca(low).sparse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("m", "n", "rank", "fraction"), [(80, 80, 4, 0.1), (60, 120, 3, 0.2), (300, 280, 5, 0.1)])
def test_altproj_recovers_both_parts(m, n, rank, fraction, dtype):
    low, sparse = planted(m, n, rank, fraction)
    result = robust_pca((low + sparse).to(dtype), method="altproj", rank=rank)
    assert bool(result.converged)
    tol = 1e-6 if dtype == torch.float64 else 1e-4
    assert float((result.low_rank.reconstruct() - low).norm()) < tol * float(low.norm())
    assert float((result.sparse - sparse).norm()) < tol * float(sparse.norm())
    assert result.dual is None


@pytest.mark.parametrize("size", [0.3, 1.0, 5.0, 1000.0])
@pytest.mark.parametrize("condition", [1.0, 0.03])
def test_altproj_takes_entries_of_any_size_and_weak_directions(size, condition):
    low, sparse = planted(100, 120, 5, 0.1)
    u, s, vh = torch.linalg.svd(low, full_matrices=False)
    low = (u[:, :5] * s[:5] * torch.logspace(0, float(np.log10(condition)), 5)) @ vh[:5]
    result = robust_pca(low + size * sparse, method="altproj", rank=5)
    assert bool(result.converged)
    # the tolerance is relative to the whole matrix, the larger of the two
    tol = 1e-6 * float(torch.maximum(low.norm(), size * sparse.norm()))
    assert float((result.low_rank.reconstruct() - low).norm()) < tol
    assert float((result.sparse - size * sparse).norm()) < tol


@pytest.mark.parametrize("method", ["altproj", "godec"])
def test_noise_is_kept_out_of_a_limited_sparse_part(method):
    low, sparse = planted(100, 90, 3, 0.05)
    noise = 0.1 * torch.from_numpy(np.random.default_rng(2).standard_normal((100, 90)))
    count = int((sparse != 0).sum())
    result = robust_pca(low + sparse + noise, method=method, rank=3, sparsity=count)
    assert torch.equal(result.mask, sparse != 0)
    assert float(result.error) < float(noise.norm())
    # the noise inside the tangent space of rank 3: 3 (100 + 90 - 3) of 9000 entries, and it hides behind S
    assert float((result.low_rank.reconstruct() - low).norm()) < 1.5 * float(noise.norm()) * np.sqrt(561 / 9000)


def test_rounding_does_not_add_up_over_the_steps():
    a = torch.from_numpy(np.random.default_rng(5).standard_normal((9, 12))).float()
    low = robust_pca(a, method="altproj", rank=4, sparsity=0.2, tol=1e-30, max_iterations=1000).low_rank
    for basis in (low.u, low.vh.mT):
        # a few roundings of float32
        np.testing.assert_allclose((basis.mT @ basis).numpy(), np.eye(4), atol=2e-6)


def test_godec_is_not_misled_by_an_entry_that_outweighs_the_rest():
    a = torch.outer(torch.arange(1.0, 9.0), torch.ones(8))
    a[2, 5] += 50  # now the first singular vectors point at it
    result = robust_pca(a, method="godec", rank=1, sparsity=1)
    assert result.mask.nonzero().tolist() == [[2, 5]]
    assert float(result.error) < 1e-4


@pytest.mark.parametrize("sparsity", [70, 0.05, (1, 4), 0])
def test_no_step_of_godec_raises_the_error(sparsity):
    a = torch.from_numpy(np.random.default_rng(0).standard_normal((30, 48)))
    errors = [
        float(robust_pca(a, method="godec", rank=4, sparsity=sparsity, max_iterations=steps).error)
        for steps in (1, 2, 3, 5, 8, 13, 200)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= best_error(a, 4) * (1 + 1e-12)


def test_godec_ends_where_both_parts_are_projections_of_the_rest():
    a = torch.from_numpy(np.random.default_rng(0).standard_normal((30, 48)))
    a[3, 4] = 30
    result = robust_pca(a, method="godec", rank=4, sparsity=72, tol=1e-14, max_iterations=20000)
    left = (a - result.low_rank.reconstruct()).abs()
    assert torch.equal(result.mask, left >= left.flatten().sort().values[-72])
    np.testing.assert_allclose(best_error(a - result.sparse, 4), float(result.error), rtol=1e-9)


@pytest.mark.parametrize("method", ["altproj", "godec"])
@pytest.mark.parametrize(
    ("sparsity", "per_row", "most"),
    [(7, False, 7), (0.1, False, 58), (2, True, 2), (0.25, True, 6), ((2, 4), False, 2), (10**9, False, 576)],
)
def test_the_pattern_holds(method, sparsity, per_row, most):
    a = torch.from_numpy(np.random.default_rng(0).standard_normal((24, 24)))
    result = robust_pca(a, method=method, rank=3, sparsity=sparsity, per_row=per_row, max_iterations=50)
    if isinstance(sparsity, tuple):
        counts = result.mask.unflatten(-1, (-1, sparsity[1])).sum(dim=-1)
    else:
        counts = result.mask.sum(dim=-1) if per_row else result.mask.sum()
    assert bool((counts <= most).all())
    if method == "godec":
        assert bool((counts == most).all())
        assert float((a - result.reconstruct())[result.mask].abs().max()) < 1e-12


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    method=st.sampled_from(["pcp", "altproj", "godec"]),
    rank=st.integers(1, 14),
    decay=st.sampled_from([0.0, 0.5, 3.0]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 1e30, 1e-30]),
    seed=st.integers(0, 10**6),
)
def test_laws(shape, method, rank, decay, dtype, scale, seed):
    m, n = shape
    if dtype in (torch.bfloat16, torch.float16):
        scale = 1.0
    rows = np.exp(-decay * np.arange(m))[:, None]
    a = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape) * rows * scale).to(dtype)
    before = a.clone()
    options = {} if method == "pcp" else {"rank": rank, "sparsity": 0.2}
    result = robust_pca(a, method=method, max_iterations=100, **options)
    assert torch.equal(a, before)
    low = result.low_rank
    assert low.u.dtype == result.sparse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert low.rank <= min(m, n)
    norm = float(a.double().norm()) + 1e-300
    dense = (low.u.double() * low.s.double()) @ low.vh.double()
    assert abs(float(result.error) - float((a.double() - dense - result.sparse.double()).norm())) <= 1e-5 * norm
    for basis in (low.u.double(), low.vh.double().mT):
        np.testing.assert_allclose((basis.mT @ basis).numpy(), np.eye(low.rank), atol=1e-5)
    assert bool((low.s.diff() <= 0).all())
    if method != "pcp":
        assert low.rank == min(rank, m, n)
        assert int(result.mask.sum()) <= round(0.2 * m * n)
    if method == "godec":
        assert float(result.error) <= best_error(a / scale, rank) * scale + 1e-5 * norm


@pytest.mark.parametrize("method", ["pcp", "altproj", "godec"])
def test_batch_equals_loop_and_repeats(method):
    # ranks differ within the batch
    parts = [planted(30, 26, rank, 0.05, seed=rank) for rank in (1, 3, 2, 2)]
    a = torch.stack([low + sparse for low, sparse in parts]).reshape(2, 2, 30, 26)
    options = {} if method == "pcp" else {"rank": 3, "sparsity": 0.1, "max_iterations": 40}
    result, again = (robust_pca(a, method=method, **options) for _ in range(2))
    assert torch.equal(result.sparse, again.sparse)
    assert torch.equal(result.low_rank.u, again.low_rank.u)
    assert result.converged.shape == result.iterations.shape == result.error.shape == (2, 2)
    for i in range(2):
        for j in range(2):
            one = robust_pca(a[i, j], method=method, **options)
            assert torch.equal(one.sparse, result.sparse[i, j])
            assert torch.equal(one.error, result.error[i, j])
            assert int(one.iterations) == int(result.iterations[i, j])
            torch.testing.assert_close(one.low_rank.reconstruct(), result.low_rank.reconstruct()[i, j])


@pytest.mark.parametrize("method", ["pcp", "altproj", "godec"])
@pytest.mark.parametrize(
    "a",
    [torch.zeros(6, 8), torch.ones(6, 8), torch.ones(1, 5), torch.ones(5, 1), torch.ones(1, 1), torch.eye(6)[::2].T],
    ids=["zero", "rank one", "one row", "one column", "one entry", "strided"],
)
def test_degenerate(a, method):
    options = {} if method == "pcp" else {"rank": 1, "sparsity": 0.5}
    result = robust_pca(a, method=method, **options)
    assert bool(result.reconstruct().isfinite().all())
    torch.testing.assert_close(result.error.float(), (a - result.reconstruct()).norm(), rtol=1e-4, atol=1e-5)


def test_a_run_that_was_cut_short_says_so():
    low, sparse = planted(40, 40, 2, 0.1)
    assert not bool(robust_pca(low + sparse, max_iterations=2).converged)
    assert int(robust_pca(low + sparse, max_iterations=2).iterations) == 2
    assert not bool(robust_pca(low + sparse, method="altproj", rank=2, max_iterations=2).converged)


def test_messages():
    a = torch.eye(4)
    for options, message in (
        ({"method": "svd"}, "method must be one of pcp, altproj, godec"),
        ({"rank": 2}, "finds rank and sparsity itself"),
        ({"sparsity": 2}, "finds rank and sparsity itself"),
        ({"method": "godec", "rank": 0, "sparsity": 1}, "needs a rank of at least 1, not 0"),
        ({"method": "altproj"}, "needs a rank of at least 1, not None"),
        ({"method": "godec", "rank": 1}, '"godec" needs sparsity'),
        ({"method": "godec", "rank": 1, "sparsity": 1.5}, r"fraction in \[0, 1\], not 1.5"),
        ({"method": "godec", "rank": 1, "sparsity": -1}, "at least 0"),
        ({"method": "godec", "rank": 1, "sparsity": (5, 4)}, "0 <= N <= M"),
        ({"method": "godec", "rank": 1, "sparsity": 1, "observed": a > 0}, 'for "pcp", not "godec"'),
        ({"sparse_weight": 0.0}, "sparse_weight must be positive"),
        ({"tol": 0.0}, "tol must be positive"),
        ({"max_iterations": 0}, "max_iterations at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            robust_pca(a, **options)
    for observed in (torch.ones(4, 3) > 0, a):
        with pytest.raises(LinalgError, match=r"observed: .*give a bool tensor of \(4, 4\)"):
            robust_pca(a, observed=observed)
    with pytest.raises(LinalgError, match="is empty"):
        robust_pca(a[:, :0])
    with pytest.raises(LinalgError, match="NaN or Inf"):
        robust_pca(a / 0)
    with pytest.raises(LinalgError, match="rows that 3 does not divide"):
        robust_pca(a, method="godec", rank=1, sparsity=(1, 3))
