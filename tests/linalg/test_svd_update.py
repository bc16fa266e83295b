"""SVDUpdate: every update against the dense one of Zha and Simon, written here with numpy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eckart.linalg import LinalgError
from eckart.linalg._sparse import as_tensor, compress
from eckart.linalg._sv_lcov import orthonormal
from eckart.linalg.svd_update import SVDUpdate, UpdatableSVD

METHODS = ("exact", "gkl", "rpi")
every_method = pytest.mark.parametrize("method", METHODS)


class Dense:
    """The same three updates on dense arrays: the SVD of [diag(s) 0; eᵀ in the basis], by QR of what is new."""

    def __init__(self, state: UpdatableSVD) -> None:
        self.rank = state._options.rank
        self.u, self.s, self.v = (part.double().numpy() for part in (state.u, state.s, state.vh.mT))

    def add_low_rank(self, d: np.ndarray, e: np.ndarray) -> None:
        (qu, ru), (qv, rv) = (np.linalg.qr(np.hstack(pair)) for pair in ((self.u, d), (self.v, e)))
        k = self.s.size
        f, s, gh = np.linalg.svd(ru[:, :k] * self.s @ rv[:, :k].T + ru[:, k:] @ rv[:, k:].T)
        rank = min(self.rank, s.size)
        self.u, self.s, self.v = (qu @ f)[:, :rank], s[:rank], (qv @ gh.T)[:, :rank]

    def add_rows(self, e: np.ndarray) -> None:
        self.u = np.vstack([self.u, np.zeros((len(e), self.s.size))])
        self.add_low_rank(np.vstack([np.zeros((len(self.u) - len(e), len(e))), np.eye(len(e))]), e.T)

    def add_columns(self, e: np.ndarray) -> None:
        self.u, self.v = self.v, self.u
        self.add_rows(e.T)
        self.u, self.v = self.v, self.u

    def reconstruct(self) -> np.ndarray:
        return (self.u * self.s) @ self.v.T


def sparse(m: int, n: int, density: float = 0.03, seed: int = 0, factors: int = 6) -> scipy.sparse.csr_array:
    """Low rank and noise, on a sparse pattern."""
    rng = np.random.default_rng(seed)
    pattern = scipy.sparse.random_array((m, n), density=density, rng=rng).tocoo()
    left, right = rng.standard_normal((m, factors)), rng.standard_normal((n, factors))
    row, column = pattern.coords
    values = (left[row] * right[column]).sum(axis=1) + 0.3 * rng.standard_normal(row.size)
    return scipy.sparse.csr_array((values, (row, column)), shape=(m, n))


def check(state: UpdatableSVD, dense: Dense, atol: float = 1e-11, rtol: float = 1e-12) -> None:
    """Same singular values to rounding, same matrix, orthonormal vectors."""
    scale = dense.s[0] if dense.s.size else 1.0
    k = min(len(dense.s), len(state.s))
    assert not np.any(dense.s[k:] > atol * scale)
    assert np.abs(state.s.double().numpy()[:k] - dense.s[:k]).max(initial=0) <= rtol * scale
    assert np.abs(state.reconstruct().double().numpy() - dense.reconstruct()).max(initial=0) <= atol * scale
    for basis in (state.u.double(), state.vh.mT.double()):
        assert float((basis.mT @ basis - torch.eye(basis.shape[1])).abs().max()) <= atol


def test_many_batches_of_rows_equal_the_dense_update():
    """The card's check: 180 batches of 20 rows, 400 x 3000 to 4000 x 3000 and k = 16, here a quarter of each size."""
    a = sparse(1000, 750)
    state = SVDUpdate(16)(a[:100])
    dense = Dense(state)
    for start in range(100, 1000, 5):
        state.add_rows(a[start : start + 5])
        dense.add_rows(a[start : start + 5].toarray())
    assert state.shape == a.shape
    check(state, dense)
    # Rows alone, exactly: the error is the sum of what each truncation has left out.
    error = np.linalg.norm(a.toarray() - state.reconstruct().numpy())
    assert float(state.error) == pytest.approx(error, rel=1e-10)
    best = np.sqrt((np.linalg.svd(a.toarray(), compute_uv=False)[16:] ** 2).sum())
    assert best < error < 1.05 * best


@pytest.mark.parametrize("many", [3, 60], ids=["few rows", "many rows"])
def test_all_kinds_of_updates_equal_the_dense_ones(many):
    a, rng = sparse(200, 150), np.random.default_rng(3)
    state = SVDUpdate(8)(a)
    dense = Dense(state)
    for step in range(6):
        m, n = state.shape
        rows, columns = sparse(many, n, seed=step), sparse(m + many, many, seed=50 + step)
        state.add_rows(rows)
        dense.add_rows(rows.toarray())
        state.add_columns(columns)
        dense.add_columns(columns.toarray())
        d, e = (scipy.sparse.random_array((x, 4), density=0.05, rng=rng) for x in state.shape)
        state.add_low_rank(d, e)
        dense.add_low_rank(d.toarray(), e.toarray())
        check(state, dense)
    state.reset()
    check(state, dense)


def test_many_rows_at_once_find_what_all_directions_would():
    """Beyond 2 k rows the directions come from an iteration: same result as with all of them."""
    a = sparse(700, 300)
    state = SVDUpdate(8)(a[:100])
    dense = Dense(state)
    state.add_rows(a[100:])
    dense.add_rows(a[100:].toarray())
    check(state, dense)
    error = np.linalg.norm(a.toarray() - state.reconstruct().numpy())
    assert float(state.error) == pytest.approx(error, rel=1e-10)


@every_method
def test_exact_where_nothing_is_truncated(method):
    """If rank(a) <= k, a Krylov or random space of dimension k holds all there is."""
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((60, 5)), rng.standard_normal((40, 5))
    a = left @ right.T
    state = SVDUpdate(8, method=method)(torch.from_numpy(a[:20, :25]))
    state.add_rows(torch.from_numpy(a[20:, :25]))
    state.add_columns(torch.from_numpy(a[:, 25:]))
    d, e = rng.standard_normal((60, 2)), rng.standard_normal((40, 2))
    state.add_low_rank(torch.from_numpy(d), torch.from_numpy(e))
    np.testing.assert_allclose(state.reconstruct().numpy(), a + d @ e.T, rtol=0, atol=1e-10 * np.linalg.norm(a))
    assert float(state.error) < 1e-7 * np.linalg.norm(a)


@pytest.mark.parametrize("method", ["gkl", "rpi"])
def test_subspace_methods_are_near_the_exact_update(method):
    a = sparse(900, 400)
    exact, near = SVDUpdate(12)(a[:300]), SVDUpdate(12, method=method, subspace=24)(a[:300])
    for start in range(300, 900, 100):
        exact.add_rows(a[start : start + 100])
        near.add_rows(a[start : start + 100])
    errors = [np.linalg.norm(a.toarray() - state.reconstruct().numpy()) for state in (exact, near)]
    assert errors[0] <= errors[1] < 1.01 * errors[0]
    assert float(near.error) == pytest.approx(errors[1], rel=0.01)
    for basis in (near.u, near.vh.mT):
        assert float((basis.mT @ basis - torch.eye(12)).abs().max()) < 1e-12


@pytest.mark.parametrize("method", ["gkl", "rpi"])
def test_a_subspace_as_large_as_the_rows_is_exact(method):
    a = sparse(160, 120)
    state = SVDUpdate(10, method=method, subspace=60)(a[:100])
    dense = Dense(state)
    state.add_rows(a[100:])
    dense.add_rows(a[100:].toarray())
    check(state, dense, 1e-9)


@every_method
def test_columns_are_rows_of_the_transpose(method):
    a, e = sparse(90, 70), sparse(90, 30, seed=1)
    state, other = SVDUpdate(6, method=method)(a), SVDUpdate(6, method=method)(a.T)
    other._s = state._s.clone()  # from the same vectors, so that all is equal to the last digit
    other._left, other._right = type(state._left)(state.vh.mT), type(state._left)(state.u)
    other._generator.set_state(state._generator.get_state())
    state.add_columns(e)
    other.add_rows(e.T)
    torch.testing.assert_close(state.s, other.s, rtol=1e-13, atol=0)
    torch.testing.assert_close(state.reconstruct(), other.reconstruct().mT, rtol=0, atol=1e-12)


@every_method
def test_updates_with_nothing(method):
    a = sparse(60, 50)
    state = SVDUpdate(5, method=method)(a)
    before = state.reconstruct()
    state.add_rows(scipy.sparse.csr_array((3, 50)))
    state.add_columns(torch.zeros(63, 2, dtype=torch.float64))
    state.add_low_rank(torch.zeros(63, 4), torch.zeros(52, 4))
    state.add_rows(torch.zeros(0, 52))
    state.add_low_rank(torch.zeros(63, 0), torch.zeros(52, 0))
    assert state.shape == (63, 52)
    after = state.reconstruct()
    torch.testing.assert_close(after[:60, :50], before, rtol=0, atol=1e-13)
    assert not bool(after[60:].abs().max() > 1e-13)
    assert not bool(after[:, 50:].abs().max() > 1e-13)


@every_method
def test_rows_that_lie_in_the_space_add_no_direction(method):
    """The squared length outside is a difference of equal numbers there, negative as often as not."""
    rng = np.random.default_rng(1)
    right = rng.standard_normal((4, 30))
    state = SVDUpdate(4, method=method)(torch.from_numpy(rng.standard_normal((20, 4)) @ right))
    dense = Dense(state)
    for perturbation in (0.0, 1e-14, 1e-9):
        e = rng.standard_normal((6, 4)) @ right + perturbation * rng.standard_normal((6, 30))
        state.add_rows(torch.from_numpy(e))
        dense.add_rows(e)
        # Parts below 1e-6 of a row are left out; they would change nothing but in second order.
        check(state, dense, 1e-8)
    state.add_rows(torch.from_numpy(np.repeat(rng.standard_normal((1, 30)), 5, axis=0)))  # equal rows
    basis = state.vh.mT
    assert float((basis.mT @ basis - torch.eye(4)).abs().max()) < 1e-12


def test_from_nothing():
    a = sparse(80, 40)
    state = SVDUpdate(6)(scipy.sparse.csr_array((0, 40)))
    assert state.shape == (0, 40)
    assert state.s.shape == (0,)
    dense = Dense(state)
    for start in range(0, 80, 4):
        state.add_rows(a[start : start + 4])
        dense.add_rows(a[start : start + 4].toarray())
    check(state, dense)
    assert len(state.s) == 6


def test_new_directions_that_replace_all_old_ones():
    """K or L becomes singular there, and is multiplied out."""
    a = torch.zeros(4, 20, dtype=torch.float64)
    a[:, :4] = torch.eye(4, dtype=torch.float64)
    state = SVDUpdate(4)(a)
    e = torch.zeros(4, 20, dtype=torch.float64)
    e[:, 8:12] = 1e9 * torch.eye(4, dtype=torch.float64)
    state.add_rows(e)
    torch.testing.assert_close(state.reconstruct()[4:], e)
    assert float(state.error) == pytest.approx(2.0)
    state.add_rows(e[:, torch.arange(20).roll(3)] * 1e-9)
    assert bool(state.u.isfinite().all())
    assert float((state.u.mT @ state.u - torch.eye(4)).abs().max()) < 1e-12


def test_condition_of_the_factors_stays_bounded():
    """New rows that grow by a factor of two each time, in ever new directions."""
    state = SVDUpdate(3)(torch.eye(3, 200, dtype=torch.float64))
    dense = Dense(state)
    for step in range(60):
        e = torch.zeros(1, 200, dtype=torch.float64)
        e[0, 3 + step : 6 + step] = 2.0**step
        state.add_rows(e)
        dense.add_rows(e.numpy())
        assert float(torch.linalg.cond(state._left._small)) <= 1e6
        assert float(torch.linalg.cond(state._right._small)) <= 1e6
    check(state, dense)


def not_coalesced(a: scipy.sparse.csr_array) -> Tensor:
    half = torch.from_numpy(a.toarray() / 2).to_sparse()
    return torch.sparse_coo_tensor(half.indices().repeat(1, 2), half.values().repeat(2), a.shape, check_invariants=True)


FORMS = {
    "torch COO": lambda a: torch.from_numpy(a.toarray()).to_sparse(),
    "torch CSR": lambda a: torch.from_numpy(a.toarray()).to_sparse_csr(),
    "torch dense": lambda a: torch.from_numpy(a.toarray()),
    "not coalesced": not_coalesced,
    "SciPy CSR": scipy.sparse.csr_array,
    "SciPy CSC": scipy.sparse.csc_array,
    "SciPy COO": scipy.sparse.coo_array,
    "SciPy matrix": scipy.sparse.csr_matrix,
}


@pytest.mark.filterwarnings("error")  # nor do we warn
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_of_a_matrix(form):
    a = sparse(600, 130, 0.02)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        parts = [form(part) for part in (a[:500, :120], a[500:, :120], a[:, 120:])]
    state = SVDUpdate(5)(parts[0])
    state.add_rows(parts[1])
    state.add_columns(parts[2])
    expected = SVDUpdate(5)(a[:500, :120])
    expected.add_rows(a[500:, :120])
    expected.add_columns(a[:, 120:])
    torch.testing.assert_close(state.reconstruct(), expected.reconstruct(), rtol=0, atol=1e-8)


def test_compressed_blocks_are_the_matrix():
    a = sparse(300, 400, 0.001)
    for form in ("SciPy CSR", "torch dense"):
        block = compress(as_tensor(FORMS[form](a), "a"))
        again = torch.zeros(300, 400, dtype=torch.float64)
        again[:, block.columns] = block.matrix.to_dense()
        assert np.array_equal(again.numpy(), a.toarray())
        assert torch.equal(block.adjoint.to_dense(), block.matrix.to_dense().mT)
        assert block.energy == pytest.approx((a.data**2).sum())
        assert torch.equal(block.columns, block.columns.unique())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_storage(dtype):
    a = torch.from_numpy(sparse(300, 200).toarray()).to(dtype)
    state = SVDUpdate(8)(a[:100])
    dense = Dense(state)
    for start in range(100, 300, 10):
        state.add_rows(a[start : start + 10])
        dense.add_rows(a[start : start + 10].double().numpy())
    assert {part.dtype for part in (state.u, state.s, state.vh)} == {torch.float32}
    check(state, dense, 2e-5, 2e-6)
    state.reset()
    check(state, dense, 2e-5, 2e-6)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@every_method
def test_scale_equivariance(method, scale):
    a = sparse(150, 100)
    states = []
    for factor in (1.0, scale):
        state = SVDUpdate(6, method=method)(a[:80] * factor)
        state.add_rows(a[80:] * factor)
        states.append(state)
    torch.testing.assert_close(states[1].s / scale, states[0].s, rtol=1e-9, atol=0)
    assert float(states[1].error) / scale == pytest.approx(float(states[0].error), rel=1e-6)


def test_rows_and_columns_are_looked_up():
    a = sparse(120, 90)
    state = SVDUpdate(7)(a[:100])
    state.add_rows(a[100:])
    index = torch.tensor([119, 0, 55])
    torch.testing.assert_close(state.rows(index), state.u[index])
    torch.testing.assert_close(state.columns(index % 90), state.vh[:, index % 90])
    with pytest.raises(IndexError):
        state.rows(torch.tensor([120]))  # there is space behind the last row, but it is not a row


def test_results_repeat_and_nothing_is_modified():
    a = torch.from_numpy(sparse(300, 80).toarray())
    before, generator = a.clone(), torch.get_rng_state()
    results = []
    for _ in range(2):
        state = SVDUpdate(6, method="rpi")(a[:100])
        state.add_rows(a[100:])
        results.append((state.u, state.s))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(a, before)
    assert torch.equal(torch.get_rng_state(), generator)


def test_errors_leave_the_state_as_it_was():
    state = SVDUpdate(4)(sparse(30, 20))
    before = state.reconstruct()
    with pytest.raises(LinalgError, match=r"e: shape \(2, 19\), .*does not fit .* of shape \(30, 20\); give rows"):
        state.add_rows(torch.zeros(2, 19))
    with pytest.raises(LinalgError, match=r"e: shape \(20, 3\), .*columns of length 30"):
        state.add_columns(torch.zeros(20, 3))
    with pytest.raises(LinalgError, match=r"d: shape \(20, 3\)"):
        state.add_low_rank(torch.zeros(20, 3), torch.zeros(20, 3))
    with pytest.raises(LinalgError, match=r"e: shape \(20, 2\)"):
        state.add_low_rank(torch.zeros(30, 3), torch.zeros(20, 2))
    with pytest.raises(LinalgError, match="contains NaN or Inf"):
        state.add_rows(torch.full((1, 20), float("nan")).to_sparse())
    with pytest.raises(LinalgError, match="is not real floating point; convert it to float first"):
        state.add_rows(torch.ones(1, 20, dtype=torch.int64))
    with pytest.raises(LinalgError, match="is not one matrix"):
        state.add_rows(torch.ones(20))
    with pytest.raises(TypeError, match="e must be a tensor or a sparse matrix of SciPy, not list"):
        state.add_rows([[1.0] * 20])
    assert torch.equal(state.reconstruct(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"method": "svd"}, "method must be one of exact, gkl, rpi, not 'svd'"),
        ({"subspace": 0}, "subspace must be at least 1, not 0"),
        ({"iterations": 0}, "iterations must be at least 1, not 0"),
        ({"tol": 0.0}, "tol must be positive, not 0.0"),
    ],
)
def test_errors_of_options(options, message):
    with pytest.raises(ValueError, match=message):
        SVDUpdate(**options)


def test_orthonormal_directions():
    """In the form b - v w: orthogonal to v and to each other, and together they span what is outside of v."""
    generator = torch.Generator().manual_seed(0)
    v = torch.linalg.qr(torch.randn(50, 6, dtype=torch.float64, generator=generator))[0]
    e = torch.randn(50, 5, dtype=torch.float64, generator=generator)
    e = torch.cat([e, e[:, :1], v @ torch.ones(6, 1, dtype=torch.float64), torch.zeros(50, 1)], dim=1)
    b, w = orthonormal(e, v.mT @ e, 1e-12)
    q = b - v @ w
    assert q.shape == (50, 5)
    assert float((q.mT @ q - torch.eye(5)).abs().max()) < 1e-13
    assert float((v.mT @ q).abs().max()) < 1e-13
    outside = e - v @ (v.mT @ e)
    torch.testing.assert_close(q @ (q.mT @ outside), outside, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    rank=st.integers(1, 8),
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    density=st.floats(0.01, 1.0),
    seed=st.integers(0, 10**6),
)
def test_any_sequence_of_updates(m, n, rank, counts, density, seed):
    state = SVDUpdate(rank)(sparse(m, n, density, seed, 2))
    dense = Dense(state)
    for step, count in enumerate(counts):
        e = sparse(count, state.shape[1], density, seed + step + 1, 2)
        if step % 2:
            e = sparse(state.shape[0], count, density, seed + step + 1, 2)
            state.add_columns(e)
            dense.add_columns(e.toarray())
        else:
            state.add_rows(e)
            dense.add_rows(e.toarray())
    scale = max(dense.s[0], 1e-30)
    assert np.abs(state.s.numpy() - dense.s[: len(state.s)]).max() <= 1e-9 * scale
    for basis in (state.u, state.vh.mT):
        assert float((basis.mT @ basis - torch.eye(basis.shape[1])).abs().max()) < 1e-9
    assert isinstance(state.error, Tensor)
