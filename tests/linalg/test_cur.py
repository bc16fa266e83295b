"""interpolative, cur and skeleton: the right columns and rows, a core that is the pseudoinverse it claims to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError
from eckart.linalg.cur import cur, interpolative, skeleton


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tail(a, rank):
    """The best possible error of that rank."""
    return float(torch.linalg.svdvals(a.double())[rank:].square().sum().sqrt())


def harmonic(m, n, seed=0):
    """Singular values 1, 1/2, 1/3, ..."""
    k = min(m, n)
    left, right = torch.linalg.qr(normal(m, k, seed=seed))[0], torch.linalg.qr(normal(n, k, seed=seed + 1))[0]
    return left / torch.arange(1, k + 1) @ right.T


def check_interpolative(a, result, side, bound=2.0):
    dense, eps = a.double(), torch.finfo(result.skeleton.dtype).eps
    size, k = float(dense.norm()) or 1.0, result.indices.numel()
    if side == "rows":
        a, dense, skeleton, coefficients = a.mT, dense.mT, result.skeleton.mT, result.coefficients.mT
    else:
        skeleton, coefficients = result.skeleton, result.coefficients
    assert torch.equal(skeleton, a[:, result.indices].to(skeleton.dtype))
    assert torch.equal(coefficients[:, result.indices], torch.eye(k, dtype=coefficients.dtype))
    assert not coefficients.numel() or coefficients.abs().max() <= bound * (1 + 1e-6)
    error = float((dense - skeleton.double() @ coefficients.double()).norm())
    # Coefficients up to 2 pass on the rounding of k columns.
    rounding = 100 * (k + 1) * eps * size
    assert abs(float(result.error) - error) <= 2e-3 * error + rounding
    rest = dense.shape[1] - k
    assert error <= (1 + bound**2 * k * rest) ** 0.5 * tail(dense, k) + rounding


@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_interpolative(side, dtype, scale):
    a = (harmonic(40, 60) * scale).to(dtype)
    result = interpolative(a, 12, side)
    assert result.coefficients.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check_interpolative(a, result, side)
    assert float(result.error) <= 2 * tail(a, 12)
    assert result.reconstruct().shape == (40, 60)


def test_interpolative_is_exact_at_the_numerical_rank():
    a = normal(50, 6) @ normal(6, 40, seed=1)
    for side in ("columns", "rows"):
        result = interpolative(a, side=side)
        assert result.indices.numel() == 6
        assert torch.allclose(result.reconstruct(), a, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 30),
    n=st.integers(1, 30),
    rank=st.one_of(st.none(), st.integers(1, 35)),
    side=st.sampled_from(["columns", "rows"]),
    decimals=st.integers(0, 6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
    seed=st.integers(0, 999),
)
def test_interpolative_of_any_matrix(m, n, rank, side, decimals, dtype, seed):
    a = (normal(m, n, seed=seed) * torch.logspace(0, -3, n)).round(decimals=decimals).to(dtype)
    check_interpolative(a, interpolative(a, rank, side), side)


SELECTIONS = ["pivot", "leverage", "random"]
CORES = ["optimal", "intersection"]


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_core_is_the_pseudoinverse_it_claims_to_be(select, core, dtype):
    a = harmonic(40, 50).to(dtype)
    result = cur(a, 8, select=select, core=core)
    assert torch.equal(result.c, a[:, result.columns])
    assert torch.equal(result.r, a[result.rows])
    assert result.u.dtype == result.error.dtype == torch.float64
    assert len(set(result.columns.tolist())) == len(set(result.rows.tolist())) == 8
    dense = a.double().numpy()
    c, r = dense[:, result.columns], dense[result.rows]
    truth = np.linalg.pinv(c) @ dense @ np.linalg.pinv(r) if core == "optimal" else np.linalg.pinv(c[result.rows])
    # The core is as uncertain as its inverse: rounding times the condition number of c, below 1e3 here.
    assert np.allclose(result.u.numpy(), truth, rtol=1e-3, atol=np.abs(truth).max() * 1e6 * torch.finfo(dtype).eps)
    error = np.linalg.norm(dense - c @ truth @ r)
    assert abs(float(result.error) - error) <= 1e-3 * error
    assert abs(float((a.double() - result.reconstruct().double()).norm()) - error) <= 1e-3 * error


@pytest.mark.parametrize("shape", [(60, 60), (30, 90), (90, 30)], ids=str)
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_pivoted_cur_is_near_the_best(shape, core, rank):
    a = harmonic(*shape)
    error = float(cur(a, rank, core=core).error)
    bound = ((1 + 4 * rank * (shape[0] - rank)) * (1 + 4 * rank * (shape[1] - rank))) ** 0.5
    assert error <= bound * tail(a, rank)
    assert error <= (2 if core == "optimal" else 5) * tail(a, rank)  # what the docstring says of practice


def test_optimal_core_beats_every_other():
    a, rows, columns = harmonic(30, 20), torch.arange(5), torch.arange(3, 9)
    best = skeleton(a, rows, columns, core="optimal")
    for seed in range(10):
        other = best.u + 0.01 * best.u.abs().max() * normal(6, 5, seed=seed)
        assert (a - best.c @ other @ best.r).norm() > best.error


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_exact_recovery_at_exact_rank(select, core, scale, dtype):
    a = (normal(40, 5) @ normal(5, 30, seed=1)).to(dtype) * scale
    for rank in (5, 8):  # at 8 the columns are dependent
        result = cur(a, rank, select=select, core=core)
        size = a.double().norm()
        assert result.error <= 1e4 * torch.finfo(dtype).eps * size
        assert (a.double() - result.reconstruct().double()).norm() <= 1e4 * torch.finfo(dtype).eps * size
    assert cur(a, 8).columns.numel() == 5


def test_leverage_finds_the_rows_and_columns_that_matter():
    a = torch.zeros(50, 40, dtype=torch.float64)
    a[7, 3], a[20, 31] = 5.0, 2.0
    result = cur(a, 2, select="leverage")
    assert sorted(result.rows.tolist()) == [7, 20]
    assert sorted(result.columns.tolist()) == [3, 31]
    assert float(result.error) == 0


def test_nlora_start_from_the_leading_block():
    """Card: for a Gaussian 256 x 256 and r = 32, the pseudoinverse core is many times larger than the matrix."""
    a, lead = 0.02 * normal(256, 256), torch.arange(32)
    result = skeleton(a, lead, lead)
    truth = a[:, :32] @ torch.linalg.inv(a[:32, :32]) @ a[:32]
    assert (result.reconstruct() - truth).norm() <= 1e-9 * truth.norm()
    assert result.error > 2 * a.norm()
    assert cur(a, 32, core="intersection").error < 3 * a.norm()
    # A block of full rank r reproduces a matrix of rank r.
    low = normal(60, 6) @ normal(6, 50, seed=1)
    assert torch.allclose(skeleton(low, torch.arange(6), torch.arange(6)).reconstruct(), low, atol=1e-9)


def test_zero_and_single():
    for select in SELECTIONS:
        assert torch.equal(cur(torch.zeros(4, 5), 3, select=select).reconstruct(), torch.zeros(4, 5))
        for shape in ((1, 7), (7, 1), (1, 1)):
            a = normal(*shape)
            assert torch.allclose(cur(a, 3, select=select).reconstruct(), a, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 25),
    n=st.integers(1, 25),
    rank=st.integers(1, 30),
    core=st.sampled_from(CORES),
    decimals=st.integers(0, 6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
    seed=st.integers(0, 999),
)
def test_cur_of_any_matrix(m, n, rank, core, decimals, dtype, seed):
    a = normal(m, n, seed=seed).round(decimals=decimals).to(dtype)
    result = cur(a, rank, core=core)
    k, size, eps = result.columns.numel(), float(a.double().norm()), torch.finfo(result.c.dtype).eps
    bound = ((1 + 4 * k * (m - k)) * (1 + 4 * k * (n - k))) ** 0.5
    assert float(result.error) <= bound * tail(a, k) + 1e4 * eps * size
    true = float((a.double() - result.reconstruct().double()).norm())
    assert abs(float(result.error) - true) <= 1e-3 * true + 1e3 * eps * size


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    rows=st.integers(1, 14),
    columns=st.integers(1, 14),
    seed=st.integers(0, 99),
)
def test_skeleton_of_any_choice(m, n, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    a = normal(m, n, seed=seed)
    i = torch.randint(m, (rows,), generator=generator)  # repetitions are no special case
    j = torch.randint(n, (columns,), generator=generator)
    for core in CORES:
        result = skeleton(a, i, j, core=core)
        truth = np.linalg.pinv(a[i][:, j].numpy())
        if core == "optimal":
            truth = np.linalg.pinv(a[:, j].numpy()) @ a.numpy() @ np.linalg.pinv(a[i].numpy())
        assert np.allclose(result.u.numpy(), truth, rtol=1e-6, atol=1e-9 * (1 + np.abs(truth).max()))


def test_result_repeats_and_input_is_untouched():
    a = harmonic(200, 40).requires_grad_()
    before, state = a.detach().clone(), torch.get_rng_state()
    for select in SELECTIONS:
        first, second = cur(a, 5, select=select), cur(a, 5, select=select)
        assert torch.equal(first.columns, second.columns)
        assert torch.equal(first.rows, second.rows)
        assert torch.equal(first.u, second.u)
        assert not first.u.requires_grad
    other = cur(a, 5, select="random", generator=torch.Generator().manual_seed(1))
    assert other.columns.tolist() != cur(a, 5, select="random").columns.tolist()
    result = interpolative(a, 5, "rows")
    assert torch.equal(result.indices, interpolative(a, 5, "rows").indices)
    assert not result.skeleton.requires_grad
    assert torch.equal(a.detach(), before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: interpolative(normal(3, 4), 0), ValueError, "rank must be at least 1"),
        (lambda: interpolative(normal(3, 4), 1, "both"), ValueError, "side must be one of columns, rows, not 'both'"),
        (lambda: interpolative(normal(2, 3, 4), 1, "rows"), LinalgError, "is a batch"),
        (lambda: interpolative(normal(3, 4).log(), 1, "rows"), LinalgError, "NaN or Inf"),
        (lambda: cur(normal(3, 4), 0), ValueError, "rank must be at least 1"),
        (lambda: cur(normal(3, 4), 1, select="best"), ValueError, "select must be one of pivot, leverage, random"),
        (lambda: cur(normal(3, 4), 1, core="inverse"), ValueError, "core must be one of optimal, intersection"),
        (lambda: cur(normal(2, 3, 4), 1), LinalgError, "is a batch"),
        (lambda: cur(normal(0, 4), 1), LinalgError, "is empty"),
        (lambda: cur(normal(3, 4).log(), 1), LinalgError, "a: .*NaN or Inf"),
        (lambda: skeleton(normal(3, 4), torch.arange(1), torch.arange(1), core="x"), ValueError, "core must be one of"),
    ],
)
def test_no_right_answer_is_an_error(call, error, message):
    with pytest.raises(error, match=message):
        call()
