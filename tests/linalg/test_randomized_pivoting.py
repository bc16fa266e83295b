"""factor_by_pairs: the right factors of every kind, at the rate that theory gives every kind."""

from __future__ import annotations

import itertools

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError
from eckart.linalg.randomized_pivoting import RandomizedPivoting, _matchings, factor_by_pairs, pivot_round

KINDS = ["svd", "eigh", "qr", "cholesky"]
ORDERS = ["random", "cyclic"]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def input_of(kind: str, size: int, seed: int = 0) -> torch.Tensor:
    x = gaussian(size + 2, size, seed=seed)
    return x if kind in ("svd", "qr") else x.T @ x


def potential(m: np.ndarray) -> float:
    """tr(diag(M) M⁻¹) - n."""
    return float((np.diag(m) * np.diag(np.linalg.inv(m))).sum() - len(m))


def check(a: torch.Tensor, kind: str, order: str) -> None:
    """The factors have the structure of their kind and multiply to a, within rounding."""
    factors = factor_by_pairs(a, kind, order=order)
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    assert factors.left.dtype == factors.diagonal.dtype == factors.right.dtype == dtype
    left, diagonal, right = (part.double() for part in factors[:3])
    n = diagonal.shape[-1]
    assert (left.shape, right.shape) == ((*a.shape[:-1], n), (*a.shape[:-2], n, a.shape[-1]))
    exact = a.double()
    size = exact.abs().amax().clamp(min=1e-300) if a.numel() else torch.tensor(1.0)
    # Each of a few hundred rounds adds a rounding error of float64; the result is rounded once to its dtype.
    tolerance = (n + 1) * (10 * torch.finfo(dtype).eps + 1e-14)
    residual = (left * (diagonal / size)[..., None, :]) @ right - exact / size
    assert residual.abs().amax().item() <= tolerance if a.numel() else True
    eye = torch.eye(n, dtype=torch.float64)
    if kind != "cholesky":
        assert torch.allclose(left.mT @ left, eye.expand(*a.shape[:-2], n, n), atol=tolerance)
    if kind == "svd":
        assert torch.allclose(right @ right.mT, eye.expand(*a.shape[:-2], n, n), atol=tolerance)
    if kind in ("eigh", "cholesky"):
        assert torch.equal(right, left.mT)
    if kind in ("qr", "cholesky"):
        assert (right.tril(-1) == 0).all()
        assert (right.diagonal(dim1=-2, dim2=-1) == 1).all()
        assert (diagonal >= 0).all()
    else:
        assert (diagonal.diff(dim=-1) <= 0).all()
    if kind == "svd":
        assert (diagonal >= 0).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 15])
def test_factors(kind, size, order):
    check(input_of(kind, size), kind, order)
    check(input_of(kind, size, seed=1).float(), kind, order)


@pytest.mark.parametrize("order", ORDERS)
def test_values_against_lapack(order):
    x = gaussian(14, 11)
    indefinite = x[:11] + x[:11].T
    gram = x.T @ x
    # LAPACK's own error is a few eps (2e-16) of the largest value, here below 40.
    s = np.linalg.svd(x.numpy(), compute_uv=False)
    assert np.abs(factor_by_pairs(x, "svd", order=order).diagonal.numpy() - s).max() < 1e-13
    s = np.linalg.svd(x.T.numpy(), compute_uv=False)
    assert np.abs(factor_by_pairs(x.T, "svd", order=order).diagonal.numpy() - s).max() < 1e-13
    values = np.linalg.eigvalsh(indefinite.numpy())[::-1]
    assert np.abs(factor_by_pairs(indefinite, "eigh", order=order).diagonal.numpy() - values).max() < 1e-13
    lower = np.linalg.cholesky(gram.numpy())
    found = factor_by_pairs(gram, "cholesky", order=order)
    assert np.abs((found.left * found.diagonal.sqrt()).numpy() - lower).max() < 1e-13
    q, r = np.linalg.qr(x.numpy())
    signs = np.sign(np.diag(r))
    found = factor_by_pairs(x, "qr", order=order)
    assert np.abs(found.left.numpy() - q * signs).max() < 1e-13
    assert np.abs((found.diagonal[:, None] * found.right).numpy() - signs[:, None] * r).max() < 1e-13


@pytest.mark.parametrize("kind", KINDS)
def test_the_potential_falls_at_the_proven_rate_on_average_over_all_pairs(kind):
    n = 6
    a = input_of(kind, n)
    before = potential((a.T @ a if kind in ("svd", "qr") else a).numpy())
    rows = a.T.contiguous()
    after = []
    for pair in itertools.combinations(range(n), 2):
        moved, _ = pivot_round(rows, torch.eye(n).double(), torch.tensor([pair]), kind)
        after.append(potential((moved @ moved.T if kind in ("svd", "qr") else moved).numpy()))
    # An identity, for every kind: only the rounding of the inverse, of condition number about 100, is left.
    assert np.mean(after) / before == pytest.approx(1 - 2 / (n * (n - 1)), abs=1e-12)


@pytest.mark.parametrize("kind", ["svd", "qr"])
def test_random_matchings_have_the_rate_of_random_pairs(kind):
    n, rounds = 8, 7
    ratios = []
    for run in range(200):
        x = gaussian(12, n, seed=run)
        rows, right = x.T.contiguous(), torch.eye(n).double()
        for pairs in _matchings(n, "random", torch.Generator().manual_seed(run)):
            rows, right = pivot_round(rows, right, pairs, kind)
        ratios.append(potential((rows @ rows.T).numpy()) / potential((x.T @ x).numpy()))
    # 1 - 1 / (n - 1) a round; the standard error of the mean of 200 is about 3 %.
    assert np.mean(ratios) == pytest.approx((1 - 1 / (n - 1)) ** rounds, rel=0.1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [2, 3, 6, 7])
def test_rounds_are_disjoint_and_a_cyclic_sweep_takes_every_pair_once(size, order):
    rounds = list(_matchings(size, order, torch.Generator().manual_seed(0)))
    for pairs in rounds:
        assert pairs.unique().numel() == pairs.numel() == size // 2 * 2
        assert (pairs[:, 0] < pairs[:, 1]).all()
    seen = [tuple(pair) for pairs in rounds for pair in pairs.tolist()]
    assert len(seen) == size * (size - 1) // 2
    if order == "cyclic":
        assert len(set(seen)) == len(seen)


def test_one_round_keeps_what_it_must():
    pairs = torch.tensor([[0, 3], [1, 4]])
    x = gaussian(9, 5)
    for kind in KINDS:
        two_sided = kind in ("eigh", "cholesky")
        rows = x.T @ x if two_sided else x.T.contiguous()
        before = rows.clone()
        moved, right = pivot_round(rows, torch.eye(5).double(), pairs, kind)
        back = right.T @ moved @ right if two_sided else moved.T @ right
        assert torch.allclose(back, rows if two_sided else x, atol=1e-13)
        gram = moved if two_sided else moved @ moved.T
        assert gram[pairs[:, 0], pairs[:, 1]].abs().max() < 1e-14
        assert torch.equal(rows, before)
        if kind in ("svd", "eigh"):
            assert float(moved.norm()) == pytest.approx(float(rows.norm()), rel=1e-14)
            assert (right.diagonal() >= 0.7).all(), "the smaller of the two angles"
        else:
            assert float(torch.linalg.det(right)) == pytest.approx(1, rel=1e-14)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    size=st.integers(2, 9),
    batch=st.sampled_from([(), (2,), (2, 3)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_rounds_of_any_matrix_preserve_the_product(kind, size, batch, dtype, seed):
    x = gaussian(*batch, size + 1, size, seed=seed).to(dtype)
    two_sided = kind in ("eigh", "cholesky")
    rows = start = x.mT @ x + torch.eye(size, dtype=dtype) if two_sided else x.mT
    right = torch.eye(size, dtype=dtype).expand(*batch, size, size)
    for pairs in _matchings(size, "random", torch.Generator().manual_seed(seed)):
        rows, right = pivot_round(rows, right, pairs, kind)
    back = right.mT @ rows @ right if two_sided else (rows.mT @ right).mT
    # Unit triangular factors of these matrices have entries up to about ten, which multiply the rounding.
    assert torch.allclose(back, start, atol=1e3 * torch.finfo(dtype).eps * float(start.abs().max()))


def test_small_singular_values_of_a_graded_matrix_have_small_relative_errors():
    size = 8
    scales = torch.logspace(0, -18, size, dtype=torch.float64)[torch.tensor([3, 0, 7, 1, 5, 2, 6, 4])]
    a = gaussian(10, size) * scales
    mpmath.mp.dps = 50
    exact = np.array([float(s) for s in mpmath.svd_r(mpmath.matrix(a.tolist()), compute_uv=False)])
    for order in ORDERS:
        found = factor_by_pairs(a, "svd", order=order).diagonal.numpy()
        # eps times the condition number of the matrix with its columns scaled to length one, below 20.
        assert np.abs(found / exact - 1).max() < 1e-14
    lapack = np.linalg.svd(a.numpy(), compute_uv=False)
    assert np.abs(lapack / exact - 1).max() > 1e-4


def edge_cases() -> dict[str, torch.Tensor]:
    return {
        "rank 3": gaussian(10, 3) @ gaussian(3, 7, seed=1),
        "rank 3, float32": (gaussian(10, 3) @ gaussian(3, 7, seed=1)).float(),
        "repeated columns": gaussian(9, 3)[:, [0, 0, 1, 2, 1]],
        "zero": torch.zeros(5, 4),
        "zero columns": gaussian(6, 4) * torch.tensor([0.0, 1.0, 0.0, 1.0]),
        "ones": torch.ones(7, 7),
        "identity": torch.eye(5),
        "one column": gaussian(6, 1),
        "one entry": torch.tensor([[-3.0]]),
        "huge": gaussian(7, 4).float() * 1e30,
        "tiny": gaussian(7, 4).float() * 1e-30,
        "huge double": gaussian(7, 4) * 1e300,
        "half": gaussian(7, 4).half(),
        "bfloat16": gaussian(7, 4).bfloat16(),
        "strided": gaussian(14, 8)[::2, ::2],
        "batch": gaussian(2, 3, 6, 4),
        "batch of unlike matrices": torch.stack([torch.zeros(5, 4), torch.ones(5, 4), gaussian(5, 4).float()]),
        "no columns": gaussian(4, 0),
        "empty batch": gaussian(0, 4, 3),
    }


EDGE = edge_cases()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", EDGE)
def test_edge_inputs(name, order):
    a = EDGE[name]
    check(a, "svd", order)
    check(a.mT, "svd", order)
    check(a, "qr", order)
    if name not in ("huge double", "half", "bfloat16"):  # their Gram matrices overflow, or are not symmetric
        check(a.mT @ a if name != "huge" else a.mT @ (a * 1e-30), "eigh", order)


def test_columns_that_depend_on_earlier_ones_have_a_zero_in_the_diagonal_of_qr():
    a = gaussian(9, 3)[:, [0, 0, 1, 1, 2]]
    assert (factor_by_pairs(a, "qr").diagonal == 0).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_loop(kind):
    a = torch.stack([input_of(kind, 7, seed) for seed in range(3)])
    batch = factor_by_pairs(a, kind)
    for index in range(3):
        alone = factor_by_pairs(a[index], kind)
        for one, other in zip(batch[:3], alone[:3], strict=True):
            # They share their pairs, but the batch goes on until its slowest member has converged.
            assert torch.allclose(one[index], other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_result_repeats_and_input_is_untouched(kind):
    a = input_of(kind, 9).requires_grad_()
    before, state = a.detach().clone(), torch.random.get_rng_state()
    first, second = factor_by_pairs(a, kind), factor_by_pairs(a, kind)
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)
    assert not first.left.requires_grad
    assert torch.equal(a.detach(), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = factor_by_pairs(a, kind, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(first.diagonal, other.diagonal, rtol=1e-11)
    assert not torch.equal(first.right, other.right)


@pytest.mark.parametrize("kind", KINDS)
def test_cyclic_order_needs_fewer_sweeps(kind):
    a = input_of(kind, 24)
    assert factor_by_pairs(a, kind, order="cyclic").sweeps < factor_by_pairs(a, kind).sweeps / 2


def test_method_runs_the_function_with_its_options():
    a = input_of("eigh", 6)
    method = RandomizedPivoting("eigh", order="cyclic", max_sweeps=20)
    assert torch.equal(method(a).left, factor_by_pairs(a, "eigh", order="cyclic").left)
    generator = torch.Generator().manual_seed(3)
    again = factor_by_pairs(a, "eigh", generator=torch.Generator().manual_seed(3))
    assert torch.equal(RandomizedPivoting("eigh")(a, generator=generator).left, again.left)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    rank=st.integers(1, 9),
    decades=st.integers(0, 12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 10**6),
)
def test_any_matrix(m, n, rank, decades, dtype, order, seed):
    rank = min(m, n, rank)
    scales = torch.logspace(0, -decades, rank, dtype=torch.float64)
    a = ((gaussian(m, rank, seed=seed) * scales) @ gaussian(rank, n, seed=seed + 1)).to(dtype)
    check(a, "svd", order)
    check(a.T @ a, "eigh", order)
    check(a if m >= n else a.T, "qr", order)
    check(a.T @ a + torch.eye(n, dtype=dtype), "cholesky", order)


@pytest.mark.parametrize(
    ("a", "kind", "message"),
    [
        (torch.ones(2, 2, dtype=torch.complex64), "svd", "is not real floating point"),
        (torch.ones(2, 2).log() / 0, "svd", "NaN or Inf"),
        (torch.ones(3), "svd", "is not a matrix"),
        (torch.ones(2, 3), "qr", "more columns than rows"),
        (torch.ones(3, 2), "eigh", "is not square"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "eigh", "is not symmetric"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "cholesky", "is not positive definite"),
        (-torch.eye(3), "cholesky", "is not positive definite"),
        (torch.ones(3, 3), "cholesky", "is not positive definite"),
        (torch.zeros(2, 2), "cholesky", 'add to its diagonal, or use kind="eigh"'),
        (gaussian(9, 9) + gaussian(9, 9).T, "cholesky", "is not positive definite"),
    ],
)
def test_impossible_input_is_named(a, kind, message):
    with pytest.raises(LinalgError, match=message):
        factor_by_pairs(a, kind)


def test_no_convergence_is_an_error():
    with pytest.raises(LinalgError, match="does not converge in 2 sweeps; raise max_sweeps"):
        factor_by_pairs(gaussian(12, 12), max_sweeps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lu"}, "kind must be one of svd, eigh, qr, cholesky, not 'lu'"),
        ({"order": "greedy"}, "order must be one of random, cyclic, not 'greedy'"),
        ({"max_sweeps": 0}, "max_sweeps must be at least 1, not 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        factor_by_pairs(torch.eye(2), **options)
    with pytest.raises(ValueError, match=message):
        RandomizedPivoting(**options)
