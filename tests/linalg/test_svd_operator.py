"""svd_operator: triplets of known matrices from products alone."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eckart.linalg import LinalgError
from eckart.linalg.svd_operator import OperatorSVD, svd_operator

SPECTRA = {
    "harmonic": 1 / torch.arange(1.0, 501),
    "exponential": torch.exp(-torch.arange(500.0) / 15),
    "repeated": torch.cat([torch.full((30,), 2.0), torch.linspace(1, 0, 470)]),
    "flat": torch.ones(500),
    "rank 3": torch.cat([torch.tensor([3.0, 2.0, 1.0]), torch.zeros(497)]),
    "zero": torch.zeros(500),
    "two scales": torch.cat([torch.full((2,), 1e6), torch.linspace(1, 0.5, 498)]),
}


def products(a: Tensor, rank: int, **options) -> OperatorSVD:
    return svd_operator(lambda x: a @ x, lambda y: a.mT @ y, tuple(a.shape), rank, dtype=a.dtype, **options)


def check(a: Tensor, result: OperatorSVD, true: Tensor, rtol: float) -> None:
    """Orthonormal, a v = s u, the stated residual, and singular values within rtol of the largest."""
    u, s, v = (part.double() for part in (result.u, result.s, result.vh.mT))
    k, a = s.shape[0], a.double()
    if a.shape[0] < a.shape[1]:
        u, v, a = v, u, a.mT
    size = float(true[0]) if true.numel() else 0.0
    eps = torch.finfo(result.s.dtype).eps
    for basis in (u, v):
        assert float((basis.mT @ basis - torch.eye(k)).abs().max()) < 50 * eps
    assert bool((s[:-1] >= s[1:]).all())
    assert float((a @ v - u * s).abs().max()) <= 50 * eps * size
    residual = torch.linalg.vector_norm(a.mT @ u - v * s, dim=0)
    assert torch.allclose(residual, result.residual, rtol=1e-3, atol=1000 * eps * size)
    assert float((s - true[:k].double()).abs().max()) <= rtol * size


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [1, 10, 40])
def test_known_spectra(known, name, rank):
    spectrum = SPECTRA[name].double()
    # tol is 1e-8 for the vectors, and the error of a singular value is its square, so rounding is what is left. Only
    # next to one a million times as large is it 50 eps s_1^2 / s_i, which is 1e-8 of s_1, for a value amid others.
    rtol = 1e-8 if name == "two scales" else 1e-13
    for m, n in ((600, 500), (500, 600)):
        a = known(m, n, spectrum)
        check(a, products(a, rank), spectrum.sort(descending=True).values, rtol)


def test_agrees_with_scipy_on_a_sparse_matrix():
    matrix = scipy.sparse.random(3000, 1000, 0.003, format="csr", random_state=np.random.default_rng(0))
    a = torch.sparse_coo_tensor(np.stack(matrix.nonzero()), matrix.data, matrix.shape, check_invariants=True)
    result = svd_operator(lambda x: a @ x, lambda y: a.t() @ y, (3000, 1000), 20)
    true = scipy.sparse.linalg.svds(matrix, k=20, return_singular_vectors=False)[::-1]
    assert np.abs(result.s.numpy() - true).max() < 1e-12
    assert float(result.residual.max()) < 1e-7 * true[0]


def test_float32(known):
    a = known(700, 500, SPECTRA["exponential"]).float()
    check(a, products(a, 12), SPECTRA["exponential"], 1e-6)
    assert products(a, 12).u.dtype == torch.float32


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_scale_equivariance(known, scale):
    a = known(500, 400, SPECTRA["exponential"][:400]).float()
    plain, scaled = products(a, 7), products(a * scale, 7)
    torch.testing.assert_close(scaled.s / scale, plain.s, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("m", "n", "rank"), [(5, 3, 2), (3, 5, 9), (1, 1, 1), (1, 300, 1), (300, 1, 4), (40, 40, 40)])
def test_small_matrices_are_formed(m, n, rank):
    a = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = products(a, rank)
    assert result.rank == min(rank, m, n)
    check(a, result, torch.linalg.svdvals(a), 1e-7)
    if rank >= min(m, n):
        torch.testing.assert_close(result.reconstruct(), a)


def test_repeats_and_draws_from_no_global_generator(known):
    a = known(400, 300, SPECTRA["harmonic"][:300])
    state = torch.get_rng_state()
    assert torch.equal(products(a, 5).u, products(a, 5).u)
    assert torch.equal(torch.get_rng_state(), state)
    other = products(a, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(other.u, products(a, 5).u, rtol=0, atol=1e-6)


def test_tolerance_saves_products(known):
    a = known(400, 300, torch.linspace(2, 1, 300))
    counts = []
    for tol in (1e-2, 1e-6):
        seen: list[int] = []

        def matvec(x: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(x.shape[1])
            return a @ x

        result = svd_operator(matvec, lambda y: a.mT @ y, (400, 300), 3, tol=tol)
        counts.append(sum(seen))
        assert float((result.residual * result.s / result.s[0] ** 2).max()) < 1.1 * tol
    assert counts[0] < counts[1]


def test_errors():
    a = torch.eye(300, dtype=torch.float64)

    def times(x: Tensor) -> Tensor:
        return a @ x

    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        svd_operator(times, times, (300, 300), 0)
    with pytest.raises(ValueError, match="tol must be positive, not 0"):
        svd_operator(times, times, (300, 300), 1, tol=0)
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 or torch.float64, not torch.bfloat16"):
        svd_operator(times, times, (300, 300), 1, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"matvec must return shape \(400, 1\), not \(300, 1\)"):
        svd_operator(times, times, (400, 300), 1)
    with pytest.raises(ValueError, match=r"rmatvec must return shape \(300, 1\), not \(400, 1\)"):
        svd_operator(lambda x: torch.ones(400, x.shape[1]), lambda y: y, (400, 300), 1)
    with pytest.raises(LinalgError, match=r"matvec's result: .* contains NaN or Inf"):
        svd_operator(lambda x: x * float("nan"), times, (300, 300), 1)


def test_no_convergence_is_an_error(monkeypatch):
    monkeypatch.setattr(sys.modules["eckart.linalg.svd_operator"], "_MAX_RESTARTS", 2)
    d = torch.linspace(1, 0.9, 2000, dtype=torch.float64)[:, None]
    with pytest.raises(LinalgError, match=r"operator: .*no convergence after 2 restarts; raise tol"):
        svd_operator(lambda x: d * x, lambda y: d * y, (2000, 2000), 1)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 200),
    n=st.integers(1, 200),
    rank=st.integers(1, 12),
    decay=st.floats(0.3, 1.0),
    double=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_shape_and_decay(m, n, rank, decay, double, seed):
    generator, k = torch.Generator().manual_seed(seed), min(m, n)
    u, v = (torch.linalg.qr(torch.randn(x, k, dtype=torch.float64, generator=generator))[0] for x in (m, n))
    s = decay ** torch.arange(k, dtype=torch.float64)
    a = ((u * s) @ v.mT).to(torch.float64 if double else torch.float32)
    # Gram matrices: eps^(1/2) for the small singular values.
    check(a, products(a, rank), s, 3e-8 if double else 1e-3)
