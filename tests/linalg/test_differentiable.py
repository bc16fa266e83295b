"""The oracle is a central difference of the loss, and torch's own backward where it has one.

A difference of step h has error h^2 f''' / 6 + eps |f| / h: about 1e-10 of the loss at h = 1e-5.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError, eigh, svd
from eckart.linalg.differentiable import eigh_with_gradient, svd_with_gradient

SHAPES = [(7, 5), (5, 7), (6, 6), (1, 4), (4, 1), (1, 1)]
METHODS = ["full", "truncated"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slope(loss, a, direction, h=1e-5):
    return float(loss(a + h * direction) - loss(a - h * direction)) / (2 * h)


def gradient(loss, a):
    a = a.clone().requires_grad_()
    loss(a).backward()
    return a.grad


def agrees(loss, a, seeds=range(3), rel=1e-6):
    """Whether the gradient is the slope of the loss along random directions."""
    g = gradient(loss, a)
    assert g.shape == a.shape
    assert bool(g.isfinite().all())
    for seed in seeds:
        direction = normal(*a.shape, seed=100 + seed)
        assert float((g * direction).sum()) == pytest.approx(slope(loss, a, direction), rel=rel, abs=rel)


# Losses that do not depend on the basis chosen among equal singular values, with a weight M that has no symmetry.
INVARIANT = {
    "reconstruction": lambda r, M: (r.reconstruct() * M).sum(),
    "squared error": lambda r, M: (r.reconstruct() - M).square().sum(),
    "exponential": lambda r, M: (r.spectral(lambda s: torch.exp(s) - 1) * M).sum(),
    "polar factor": lambda r, M: (r.spectral(torch.ones_like) * M).sum(),
    "polar factor of the triplets": lambda r, M: ((r.u @ r.vh) * M).sum(),
    "left projector": lambda r, M: ((r.u @ r.u.mT) * (M @ M.mT)).sum(),
    "both projectors": lambda r, M: ((r.u @ r.u.mT @ M @ r.vh.mT @ r.vh) * M).sum(),
    "nuclear norm": lambda r, M: r.s.sum(),
    "log determinant": lambda r, M: r.s.square().log1p().sum(),
}
SPECTRA = {
    "distinct": [5.0, 4.0, 3.0, 2.0, 1.0],
    "two equal": [5.0, 3.0, 3.0, 1.0, 0.5],
    "all kept equal": [3.0, 3.0, 3.0, 1.0, 0.5],
    "equal among the discarded": [5.0, 4.0, 3.0, 1.0, 1.0],
    "almost equal": [3.0 + 1e-9, 3.0, 3.0 - 2e-12, 1.0, 0.5],
    "rank three": [3.0, 3.0, 2.0, 0.0, 0.0],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (5, 5)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("loss", INVARIANT)
def test_losses_of_the_leading_three_have_the_exact_gradient(loss, spectrum, shape, method, known):
    a, M = known(*shape, SPECTRA[spectrum]), normal(*shape, seed=9)
    # Gaps of about the broadening magnify rounding to eps^(1/3) at worst, unless the difference quotients are exact.
    rel = 1e-6
    if spectrum == "almost equal":
        rel = 1e-4 if "projector" in loss else 2e-5
    agrees(lambda x: INVARIANT[loss](svd_with_gradient(x, 3, method=method), M), a, rel=rel)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (5, 5)], ids=str)
@pytest.mark.parametrize(
    "spectrum", [[5.0, 4.0, 3.0, 2.0, 1.0], [2.0] * 5, [3.0, 2.0, 2.0, 0.0, 0.0], [0.0] * 5], ids=str
)
def test_the_whole_reconstruction_is_the_identity_map(spectrum, shape, known):
    M = normal(*shape, seed=9)
    g = gradient(lambda x: (svd_with_gradient(x).reconstruct() * M).sum(), known(*shape, spectrum))
    # Exact algebra: what remains is rounding.
    torch.testing.assert_close(g, M, rtol=0, atol=1e-13)


def test_torch_has_no_gradient_where_singular_values_are_equal(known):
    """If it had one, this module would not be needed."""
    a = torch.linalg.qr(normal(5, 5))[0]
    M = normal(5, 5, seed=1)

    def torch_loss(x):
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        return ((u @ vh) * M).sum()

    exact = a @ (a.mT @ M - M.mT @ a) / 2  # of the polar factor at an orthogonal matrix
    theirs = gradient(torch_loss, a)
    assert not bool(theirs.isfinite().all()) or float((theirs - exact).norm()) > 1e-3
    ours = gradient(lambda x: ((r := svd_with_gradient(x)).u @ r.vh).mul(M).sum(), a)
    # Rounding of alpha + beta, 1e-15, is magnified by eps / broadening^2 at most.
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck_of_the_triplets_themselves(shape, rank, known):
    """The signs are fixed, so on a spectrum without close values u, s and vh are smooth functions of a."""
    s = np.linspace(3, 1, min(shape))
    a = torch.stack([known(*shape, s), 2 * known(*shape, s, seed=1)]).requires_grad_()

    def triplets(x):
        result = svd_with_gradient(x, rank)
        return result.u, result.s, result.vh

    assert torch.autograd.gradcheck(triplets, a)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)], ids=str)
def test_the_gradient_is_that_of_torch_on_a_spectrum_without_close_values(shape, known):
    a = known(*shape, np.linspace(4, 1, min(shape)))
    gu, gs, gvh = normal(shape[0], 3), normal(3, seed=1), normal(3, shape[1], seed=2)

    def loss(u, s, vh):
        # Squares of entries do not see the signs, which torch does not fix.
        return (u[:, :3].square() * gu).sum() + (s[:3] * gs).sum() + (vh[:3].square() * gvh).sum()

    theirs = gradient(lambda x: loss(*torch.linalg.svd(x, full_matrices=False)), a)
    for method in METHODS:
        ours = gradient(lambda x, m=method: loss((r := svd_with_gradient(x, 3, method=m)).u, r.s, r.vh), a)
        # A gap of 0.5: the broadening of 4e-11 changes nothing, rounding is magnified by 1 / gap.
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(90, 60), (60, 90)], ids=str)
def test_truncated_and_full_agree(shape, dtype, known):
    a = known(*shape, 1 / np.arange(1.0, 61)).to(dtype)
    gu, gs, gvh = (x.to(dtype) for x in (normal(shape[0], 4), normal(4, seed=1), normal(4, shape[1], seed=2)))

    def loss(x, method):
        r = svd_with_gradient(x, 4, method=method)
        return (r.u * gu).sum() + (r.s * gs).sum() + (r.vh * gvh).sum() + (r.reconstruct() ** 3).sum()

    full, truncated = (gradient(lambda x, m=m: loss(x, m), a) for m in METHODS)
    assert truncated.dtype == dtype
    # Lanczos leaves residuals of 1e-13 or 1e-6; the smallest gap, 1/4 - 1/5, magnifies them by 20.
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    assert float((full - truncated).norm() / full.norm()) < tolerance


def test_large_matrices_take_the_truncated_way(known):
    a = known(520, 512, 1 / np.arange(1.0, 513)).requires_grad_()
    result = svd_with_gradient(a, 3)
    assert [tuple(part.shape) for part in result._source[1:4]] == [(520, 3), (3,), (3, 512)]
    M = normal(520, 512)
    (result.reconstruct() * M).sum().backward()
    g = gradient(lambda x: (svd_with_gradient(x, 3, method="full").reconstruct() * M).sum(), a.detach())
    torch.testing.assert_close(a.grad, g, rtol=0, atol=1e-9)
    assert len(svd_with_gradient(a.detach(), 20)._source[2]) == 512


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "spectrum", [[2.0] * 5, [0.0] * 5, [1.0, 0.0, 0.0, 0.0, 0.0], [3.0, 2.0, 2.0, 1.0, 0.0]], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_gradient_without_meaning_is_still_finite(dtype, spectrum, method, known):
    """A loss of the arbitrary basis, a closed gap at k, singular values of zero."""
    a = known(7, 5, spectrum).to(dtype)
    g = gradient(lambda x: ((r := svd_with_gradient(x, 2, method=method)).u * 3 + r.u**3).sum() + r.vh.sum(), a)
    assert bool(g.isfinite().all())
    # The gradients of u and v are below 6 in each entry.
    assert float(g.abs().max()) < 100 / torch.finfo(dtype).eps ** (2 / 3) / (spectrum[0] or 1.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_scale(scale, dtype, method, known):
    """The projector does not change with the scale of a, so its gradient scales inversely."""
    a, M = known(7, 5, SPECTRA["two equal"]), normal(7, 5, seed=9).to(dtype)

    def loss(x):
        r = svd_with_gradient(x, 3, method=method)
        return ((r.u @ r.u.mT) * (M @ M.mT)).sum() + (r.u @ r.vh * M).sum()

    reference = gradient(loss, a.to(dtype)).double()
    scaled = gradient(loss, (a * scale).to(dtype)).double() * scale
    tolerance = 1e-8 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(scaled, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_the_triplets_are_those_of_svd(method, dtype):
    a = normal(2, 30, 20).mT.to(dtype).requires_grad_()  # not contiguous
    copy = a.detach().clone()
    result, reference = svd_with_gradient(a, 4, method=method), svd(a, 4, driver="exact")
    assert result.u.dtype == result.s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name in ("u", "s", "vh"):
        torch.testing.assert_close(getattr(result, name), getattr(reference, name), rtol=0, atol=1e-4)
    torch.testing.assert_close(result.error, reference.error, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.reconstruct(), reference.reconstruct(), rtol=0, atol=1e-4)
    result.reconstruct().square().sum().backward()
    assert a.grad.dtype == dtype
    assert torch.equal(a.detach(), copy)
    # d ||A_k||^2 = 2 A_k; half precision rounds it once more.
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 0.05)
    torch.testing.assert_close(
        a.grad.double(), 2 * result.reconstruct().detach().double(), rtol=tolerance, atol=tolerance
    )


def test_the_error_of_what_was_left_out_has_no_scale(known):
    for scale in (1.0, 1e200, 1e-200):
        result = svd_with_gradient(known(6, 5, SPECTRA["two equal"]) * scale, 3)
        assert float(result.error) == pytest.approx(math.sqrt(1.25) * scale, rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_batch(method):
    a, M = normal(2, 3, 6, 9), normal(6, 9, seed=1)

    def loss(x):
        r = svd_with_gradient(x, 2, method=method)
        return (r.u.sum(-2) * r.s).sum() + (r.reconstruct() * M).sum() + (r.vh**3).sum()

    g = gradient(loss, a)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(g[i, j], gradient(loss, a[i, j]), rtol=1e-9, atol=1e-10)


def test_unused_outputs_and_constants():
    a = normal(5, 4)
    assert not svd_with_gradient(a).u.requires_grad
    g = gradient(lambda x: svd_with_gradient(x).s.sum(), a)
    u, _, vh, _ = svd(a)
    torch.testing.assert_close(g, u @ vh, rtol=0, atol=1e-13)
    x = a.clone().requires_grad_()
    assert not svd_with_gradient(x).error.requires_grad
    empty = torch.zeros(3, 0, requires_grad=True)
    svd_with_gradient(empty).reconstruct().sum().backward()
    assert empty.grad.shape == (3, 0)


def test_gradients_reach_what_the_function_uses(known):
    """Soft thresholding with a learned threshold t: d/dt of <M, U (S - t) Vᵀ> is -tr(Uᵀ M V)."""
    a, M = known(6, 5, [3.0, 3.0, 2.0, 0.5, 0.1]), normal(6, 5)
    threshold = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    result = svd_with_gradient(a)
    (result.spectral(lambda s: torch.relu(s - threshold)) * M).sum().backward()
    expected = -((result.u[:, :3] @ result.vh[:3]) * M).sum()
    assert float(threshold.grad) == pytest.approx(float(expected), rel=1e-12)
    agrees(lambda x: (svd_with_gradient(x).spectral(lambda s: torch.relu(s - 1.0)) * M).sum(), a)


def test_it_can_be_differentiated_once():
    a = normal(4, 3).requires_grad_()
    (g,) = torch.autograd.grad(svd_with_gradient(a).s.square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 8),
    n=st.integers(1, 8),
    rank=st.integers(1, 8),
    values=st.lists(st.sampled_from([0.0, 1.0, 1.0, 2.0, 3.0]), min_size=8, max_size=8),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 99),
)
def test_any_svd(m, n, rank, values, method, seed):
    """The gradient of ||A_k||_F^2 is 2 A_k wherever the gap at k is open, whatever else is equal or zero."""
    size = min(m, n)
    s = torch.tensor(sorted(values[:size], reverse=True), dtype=torch.float64)
    u, v = torch.linalg.qr(normal(m, size, seed=seed))[0], torch.linalg.qr(normal(n, size, seed=seed + 100))[0]
    a = (u * s) @ v.mT
    k = min(rank, size)
    g = gradient(lambda x: svd_with_gradient(x, rank, method=method).reconstruct().square().sum(), a)
    assert bool(g.isfinite().all())
    if k == size or s[k - 1] > s[k] or s[k - 1] == 0:
        torch.testing.assert_close(g, 2 * (u[:, :k] * s[:k]) @ v[:, :k].mT, rtol=0, atol=1e-9)


SYMMETRIC = {
    "exponential": lambda r, M: (r.spectral(torch.exp) * M).sum(),
    "square": lambda r, M: (r.spectral(torch.square) * M).sum(),
    "projector": lambda r, M: ((r.vectors @ r.vectors.mT) * M).sum(),
    "trace": lambda r, M: r.values.pow(3).sum(),
}


@pytest.mark.parametrize("rank", [None, 2, 3])
@pytest.mark.parametrize(
    "values", [[4.0, 3.0, 1.0, -0.5, -2.0], [3.0, 3.0, 1.0, -2.0, -2.0], [3.0, 3.0 + 1e-10, 1.0, 0.0, -5.0]], ids=str
)
@pytest.mark.parametrize("loss", SYMMETRIC)
def test_losses_of_the_leading_eigenpairs_have_the_exact_gradient(loss, values, rank, known_gram):
    a, M = known_gram(5, values), normal(5, 5, seed=9)
    agrees(lambda x: SYMMETRIC[loss](eigh_with_gradient((x + x.mT) / 2, rank), M), a)


@pytest.mark.parametrize("rank", [None, 2])
def test_gradcheck_of_the_eigenpairs(rank, known_gram):
    a = torch.stack([known_gram(4, [3.0, 1.0, -1.0, -2.0]), known_gram(4, [9.0, 4.0, 2.0, 1.0], seed=1)])

    def pairs(x):
        result = eigh_with_gradient((x + x.mT) / 2, rank)
        return result.values, result.vectors

    assert torch.autograd.gradcheck(pairs, a.requires_grad_())


def test_eigenpairs_are_those_of_eigh_and_the_gradient_is_symmetric(known_gram):
    a = known_gram(5, [4.0, 3.0, 1.0, -0.5, -2.0])
    result, reference = eigh_with_gradient(a, 3), eigh(a, 3)
    assert torch.equal(result.values, reference.values)
    assert torch.equal(result.vectors, reference.vectors)
    g = gradient(lambda x: (eigh_with_gradient(x, 3).vectors ** 3).sum(), a)
    torch.testing.assert_close(g, g.mT, rtol=0, atol=1e-12)
    low = gradient(lambda x: eigh_with_gradient(x).values[0], a.to(torch.bfloat16))
    assert low.dtype == torch.bfloat16


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.sampled_from([-2.0, 0.0, 1.0, 1.0, 3.0]), min_size=1, max_size=7),
    rank=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_any_symmetric_matrix(values, rank, seed):
    """The gradient of tr A_k^3 is 3 A_k^2 wherever the gap at k is open."""
    n = len(values)
    w = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    q = torch.linalg.qr(normal(n, n, seed=seed))[0]
    a = (q * w) @ q.mT
    k = min(rank, n)
    g = gradient(lambda x: eigh_with_gradient(x, rank).spectral(lambda v: v**3).trace(), (a + a.mT) / 2)
    assert bool(g.isfinite().all())
    if k == n or w[k - 1] > w[k]:
        torch.testing.assert_close(g, 3 * (q[:, :k] * w[:k] ** 2) @ q[:, :k].mT, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: svd_with_gradient(torch.eye(2), 0), ValueError, "rank must be at least 1, not 0"),
        (lambda: svd_with_gradient(torch.eye(2), method="qr"), ValueError, "method must be one of auto, full, trunc"),
        (lambda: svd_with_gradient(torch.eye(2), broadening=0.0), ValueError, "broadening must be a positive number"),
        (lambda: svd_with_gradient(torch.full((2, 2), math.nan)), LinalgError, "a: .*NaN or Inf"),
        (lambda: svd_with_gradient(torch.ones(2)), LinalgError, "is not a matrix"),
        (lambda: svd_with_gradient(torch.zeros(2, 2)).spectral(torch.sqrt), LinalgError, "derivative is NaN or infin"),
        (lambda: svd_with_gradient(torch.eye(2)).spectral(torch.sum), LinalgError, "f: .*changes the shape"),
        (lambda: eigh_with_gradient(torch.eye(2), 0), ValueError, "rank must be at least 1, not 0"),
        (lambda: eigh_with_gradient(torch.eye(2), broadening=-1.0), ValueError, "broadening must be"),
        (lambda: eigh_with_gradient(torch.tensor([[0.0, 1.0], [0.0, 0.0]])), LinalgError, "is not symmetric"),
        (lambda: eigh_with_gradient(-torch.eye(2)).spectral(torch.log), LinalgError, "NaN or infinite at a value"),
    ],
)
def test_what_has_no_answer_is_refused(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
