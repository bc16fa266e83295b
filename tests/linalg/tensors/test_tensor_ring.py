from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError
from eckart.linalg.tensors.tensor_ring import TensorRing, tensor_ring
from eckart.linalg.tensors.tensor_train import tensor_train


def random_ring(sizes, rank, gaussian, seed):
    cores = tuple(gaussian(rank, n, rank, seed=seed + k) for k, n in enumerate(sizes))
    return TensorRing(cores, torch.zeros((), dtype=torch.float64))


@pytest.fixture(scope="module")
def check(distance):
    """check(t, ranks, ...) -> the result, after the laws of a tensor ring were tested on it."""

    def verify(t, ranks, **options):
        result = tensor_ring(t, ranks, **options)
        wanted = [ranks] * t.ndim if isinstance(ranks, int) else ranks
        assert result.shape == t.shape
        assert all(r <= most for r, most in zip(result.ranks, wanted, strict=True))
        assert all(
            one.shape[2] == other.shape[0] for one, other in itertools.pairwise([*result.cores, result.cores[0]])
        )
        assert result.parameters == sum(core.numel() for core in result.cores)
        assert result.error.dtype == torch.float64
        size, eps = float(t.double().norm()), torch.finfo(result.cores[0].dtype).eps
        made = distance(t, result.reconstruct())
        assert float(result.error) == pytest.approx(made, rel=2e-3, abs=100 * eps * size)
        assert made <= size * (1 + 10 * eps)
        return result

    return verify


def test_entries_are_traces(gaussian):
    ring = random_ring((2, 3, 4), 2, gaussian, 0)
    t = ring.reconstruct()
    for i, j, k in itertools.product(range(2), range(3), range(4)):
        product = ring.cores[0][:, i] @ ring.cores[1][:, j] @ ring.cores[2][:, k]
        assert float(t[i, j, k]) == pytest.approx(float(product.trace()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8, 5), (9, 5, 4), (6, 5, 4, 5)], ids=str)
def test_sweeps_never_raise_the_error(shape, dtype, smooth, check):
    t = smooth(*shape).to(dtype)
    errors = [float(check(t, 2, max_sweeps=k, tol=1e-9).error) for k in (0, 1, 2, 5, 20)]
    slack = 1e-6 * float(t.norm())
    assert all(later <= earlier + slack for earlier, later in itertools.pairwise(errors))
    if len(shape) > 2:  # for a matrix the start is the truncated SVD of rank r_1 r_2
        assert errors[-1] < errors[0]


def test_a_ring_closed_by_one_is_a_train(smooth, check):
    t = smooth(6, 5, 4, 5)
    ring, train = check(t, (1, 3, 2, 3), max_sweeps=0), tensor_train(t, (3, 2, 3))
    assert torch.allclose(ring.reconstruct(), train.reconstruct())
    assert float(check(t, (1, 3, 2, 3)).error) <= float(train.error) * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rings_are_recovered_where_trains_are_not(dtype, gaussian, check):
    recovered = 0
    for seed in range(6):
        t = random_ring((6, 6, 6, 6), 2, gaussian, 10 * seed).reconstruct().to(dtype)
        size = float(t.norm())
        assert float(tensor_train(t, 2).error) > 0.1 * size
        recovered += float(check(t, 2, max_sweeps=200).error) < 1e-3 * size
    assert recovered >= 4  # alternating least squares do not always find it


def test_matrix_multiplication_is_a_ring(check):
    core = torch.einsum("ap,qb->apqb", torch.eye(3), torch.eye(3)).flatten(1, 2)
    t = TensorRing((core,) * 3, torch.zeros(())).reconstruct()
    x, y = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)).unbind()
    product = torch.einsum("ijk,i,j->k", t, x.flatten(), y.flatten())
    assert torch.allclose(product, (x @ y).T.flatten(), atol=1e-5)
    assert float(check(t, 3).error) < 1e-5


def test_room_for_the_ranks_decides(gaussian, check):
    t = gaussian(6, 5, 4)
    assert check(t, 4).ranks[:2] == (2, 3)
    assert check(t, (5, 1, 2)).ranks[:2] == (5, 1)
    assert check(t, (1, 9, 2)).ranks[:2] == (1, 6)
    assert check(t, (3, 2, 2)).ranks == (3, 2, 2)
    assert check(gaussian(16, 5, 6), 4).ranks == (4, 4, 4)
    full = check(gaussian(6, 2, 3), (2, 3, 6))
    assert float(full.error) < 1e-12  # every step of the start keeps all


def test_degenerate_tensors(gaussian, check):
    for t in [
        torch.zeros(4, 3, 5),
        torch.ones(1, 1),
        gaussian(1, 6, 1),
        gaussian(5, 4, 6).permute(2, 0, 1)[:, ::2],
        torch.ones(4, 5, 6),
        gaussian(6, 5).bfloat16(),
    ]:
        check(t, 2)


@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_scale_of_the_tensor_is_that_of_the_first_core(factor, smooth):
    t = smooth(6, 5, 4).float()
    plain, scaled = tensor_ring(t, 2), tensor_ring(t * factor, 2)
    assert float(scaled.error) / factor == pytest.approx(float(plain.error), rel=0.02)
    assert torch.allclose(scaled.reconstruct().double() / factor, plain.reconstruct().double(), atol=1e-2)


def test_result_repeats_and_input_is_unchanged(gaussian):
    t = gaussian(300, 280).float().requires_grad_()
    before = t.detach().clone()
    first, second = tensor_ring(t, (2, 2)), tensor_ring(t, (2, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.cores, second.cores, strict=True))
    assert torch.equal(t.detach(), before)
    other = tensor_ring(t, (2, 2), generator=torch.Generator().manual_seed(3))
    assert not torch.equal(other.cores[0], first.cores[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ranks": 0}, ValueError, "ranks must be at least 1, not 0"),
        ({"ranks": (2, 0, 2)}, ValueError, r"ranks\[1\] must be at least 1, not 0"),
        ({"ranks": (2, 2)}, ValueError, "ranks has 2 entries; give 3, one for each bond"),
        ({"ranks": 2, "tol": 0}, ValueError, "tol must be positive"),
        ({"ranks": 2, "max_sweeps": -1}, ValueError, "max_sweeps at least 0"),
        ({"ranks": 2, "t": torch.ones(4)}, LinalgError, r"\(4,\).*has no bonds"),
        ({"ranks": 2, "t": torch.full((2, 3), torch.nan)}, LinalgError, "contains NaN or Inf"),
        ({"ranks": 2, "t": torch.ones(2, 0)}, LinalgError, "no tensor with entries"),
    ],
)
def test_what_cannot_be_done_is_said(options, error, message, gaussian):
    with pytest.raises(error, match=message):
        tensor_ring(**({"t": gaussian(3, 4, 5)} | options))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    ranks=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    sweeps=st.sampled_from([0, 3, 10]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    decimals=st.sampled_from([0, 8]),
    seed=st.integers(0, 99),
)
def test_laws_for_any_tensor(shape, ranks, sweeps, dtype, decimals, seed, smooth, check):
    t = smooth(*shape, seed=seed).round(decimals=decimals).to(dtype)
    check(t, ranks[: len(shape)], max_sweeps=sweeps)
