from __future__ import annotations

import numpy as np
import pytest
import torch

from eckart.linalg import LinalgError, weighted_svd

SHAPES = [(6, 9), (9, 6), (7, 7), (1, 5), (5, 1), (40, 25), (25, 40)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def root(gram: torch.Tensor) -> np.ndarray:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(gram.double().numpy())
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def weighted_norm(e: torch.Tensor, gram: torch.Tensor) -> float:
    return float(np.linalg.norm(e.double().numpy() @ root(gram)))


def spectrum(a: torch.Tensor, gram: torch.Tensor) -> np.ndarray:
    return np.linalg.svd(a.double().numpy() @ root(gram), compute_uv=False)


def projected(a: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    return basis.double() @ (basis.double().T @ a.double())


@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_equals_the_svd_of_a_s(shape, kind):
    a, x = normal(*shape), normal(60, shape[1], seed=1)
    weight = {"none": None, "diagonal": x.square().sum(0), "full": x.T @ x}[kind]
    gram = torch.eye(shape[1], dtype=torch.float64) if weight is None else weight
    gram = gram.diag() if gram.ndim == 1 else gram
    truth = spectrum(a, gram)
    result = weighted_svd(a, weight)
    small = min(shape)
    assert (result.basis.shape, result.s.shape) == ((shape[0], small), (small,))
    assert result.s.dtype == result.basis.dtype == torch.float64
    # Eigenvalues of a product of condition below 1e3: their roots are good to 1e-16 * 1e6, and _UNSEEN adds 1e-10.
    np.testing.assert_allclose(result.s, truth, rtol=1e-9)
    torch.testing.assert_close(result.basis.T @ result.basis, torch.eye(small).double(), rtol=0, atol=1e-12)
    for k in range(1, small + 1):
        error = weighted_norm(a - projected(a, result.basis[:, :k]), gram)
        assert error == pytest.approx(np.linalg.norm(truth[k:]), rel=1e-8, abs=1e-10 * truth[0])
        assert result.tail(k) == pytest.approx(np.linalg.norm(truth[k:]), rel=1e-8, abs=1e-12)
        one = weighted_svd(a, weight, rank=k)
        assert one.basis.shape == (shape[0], k)
        torch.testing.assert_close(projected(a, one.basis), projected(a, result.basis[:, :k]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)], ids=str)
@pytest.mark.parametrize("rank", [4, 16, 30])
def test_a_float32_matrix_under_a_gram_of_condition_1e9_gets_the_accurate_answer(shape, rank, known_gram):
    """In float32 the 14th direction and all after it are noise: the answer must come from float64 there."""
    a = normal(*shape).float()
    gram = known_gram(shape[1], np.logspace(0, -9, shape[1]) * 1e5)
    best = np.linalg.norm(spectrum(a, gram)[rank:])
    result = weighted_svd(a, gram, rank)
    assert result.basis.dtype == torch.float32
    # U itself is rounded to float32: that is 6e-8 of everything.
    everything = spectrum(a, gram)[0]
    assert weighted_norm(a - projected(a, result.basis), gram) <= 1.0004 * best + 3e-7 * everything
    assert weighted_norm(a - projected(a, result.basis), gram) >= best * (1 - 1e-6)


def test_double_gives_the_whole_spectrum_where_float32_would_give_noise(known_gram):
    a, gram = normal(24, 24).float(), known_gram(24, np.logspace(0, -9, 24))
    truth = spectrum(a, gram)
    # The 1e-10 of the mean that every direction counts shows next to eigenvalues of 1e-9.
    np.testing.assert_allclose(weighted_svd(a, gram, rank=1, double=True).s, truth, rtol=1e-2)
    noisy = weighted_svd(a, gram, rank=1).s.numpy()
    assert abs(noisy / truth - 1).max() > 0.1, "if float32 were good enough, `double` would not be needed"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 6), (6, 8)], ids=str)
@pytest.mark.parametrize(("a_scale", "g_scale"), [(1e30, 1e30), (1e-30, 1e-30), (1e30, 1e-60), (1e-30, 1e60)])
def test_no_scale_overflows_or_vanishes(shape, dtype, a_scale, g_scale):
    a, x = normal(*shape), normal(50, shape[1], seed=1)
    gram = x.T @ x
    scaled = (a * a_scale).to(dtype)
    truth = spectrum(scaled.double() / a_scale, gram) * a_scale * g_scale**0.5
    result = weighted_svd(scaled, gram * g_scale, rank=3)
    np.testing.assert_allclose(result.s, truth, rtol=1e-5)
    reference = weighted_svd((scaled.double() / a_scale), gram, rank=3).basis
    torch.testing.assert_close(result.basis.double().abs(), reference.abs(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)], ids=str)
def test_rank_left_over_by_a_deficient_gram_goes_to_the_matrix_itself(shape, dtype):
    """Three tokens: beyond rank three the weighted error is zero, and the plain one decides."""
    a, x = normal(*shape).to(dtype), normal(3, shape[1], seed=1)
    result = weighted_svd(a, x.T @ x, rank=6)
    b = projected(a, result.basis)
    assert weighted_norm(a - b, x.T @ x) < 1e-5 * weighted_norm(a, x.T @ x)
    # The best that can be done: what the first three directions leave, approximated by plain SVD.
    first = projected(a, result.basis[:, :3])
    rest = torch.linalg.svdvals(a.double() - first)
    assert float((a.double() - b).norm()) == pytest.approx(float(rest[3:].norm()), rel=1e-3)
    full = weighted_svd(a, x.T @ x)
    torch.testing.assert_close(projected(a, full.basis), a.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("gram", [torch.zeros(5), torch.zeros(5, 5), torch.zeros(5, 5, dtype=torch.float64)])
@pytest.mark.parametrize("rows", [3, 8])
def test_a_zero_weight_prefers_no_direction(gram, rows):
    a = normal(rows, 5)
    plain = weighted_svd(a, rank=2)
    result = weighted_svd(a, gram, rank=2)
    assert torch.equal(result.basis, plain.basis)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
def test_a_zero_matrix_has_an_orthonormal_basis_and_no_error(shape):
    x = normal(20, shape[1])
    result = weighted_svd(torch.zeros(shape), x.T @ x, rank=3)
    assert torch.equal(result.s, torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(result.basis.T @ result.basis, torch.eye(3), rtol=0, atol=1e-6)


def test_a_rank_deficient_matrix_is_reproduced_at_its_rank():
    a, x = normal(20, 3) @ normal(3, 15, seed=1), normal(60, 15, seed=2)
    for matrix in (a, a.T.contiguous()):
        weight = x.T @ x if matrix.shape[1] == 15 else normal(60, 20, seed=2).T @ normal(60, 20, seed=2)
        result = weighted_svd(matrix, weight, rank=3)
        torch.testing.assert_close(projected(matrix, result.basis), matrix, rtol=0, atol=1e-12)
        assert result.tail(3) < 1e-6 * float(result.s[0])


def test_a_given_factor_saves_the_factorisation_and_not_the_answer():
    a, x = normal(12, 8), normal(50, 8, seed=1)
    gram = x.T @ x
    factor = torch.linalg.cholesky(gram)
    own, given = weighted_svd(a, gram, 4), weighted_svd(a, gram, 4, factor=factor)
    torch.testing.assert_close(projected(a, given.basis), projected(a, own.basis), rtol=0, atol=1e-9)
    torch.testing.assert_close(given.s, own.s, rtol=1e-9, atol=0)


def test_non_contiguous_input_and_nothing_is_changed():
    big, x = normal(16, 20), normal(50, 10, seed=1)
    a, gram = big[::2, ::2], (x.T @ x).T
    copies = a.clone(), gram.clone()
    result = weighted_svd(a, gram, 3)
    torch.testing.assert_close(result.basis, weighted_svd(a.contiguous(), gram.contiguous(), 3).basis)
    assert torch.equal(a, copies[0])
    assert torch.equal(gram, copies[1])


@pytest.mark.parametrize(
    ("a", "gram", "rank", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 2), None, LinalgError, r"weight: shape \(2, 2\).*matrix of 3 columns"),
        (torch.ones(2, 3), torch.ones(4), None, LinalgError, r"weight: shape \(4,\)"),
        (torch.tensor([[1.0, float("nan")]]), None, None, LinalgError, r"a: shape \(1, 2\).*NaN or Inf"),
        (torch.ones(1, 2), torch.tensor([1.0, float("inf")]), None, LinalgError, "weight: .*NaN or Inf"),
        (torch.ones(1, 2), torch.tensor([1.0, -1.0]), None, LinalgError, "negative diagonal"),
        (torch.ones(1, 2), torch.diag(torch.tensor([1.0, -1.0])), None, LinalgError, "negative diagonal"),
        (torch.ones(0, 2), None, None, LinalgError, "a: shape .0, 2.*is not a matrix with entries"),
        (torch.ones(2, 2, 2), None, None, LinalgError, "is not a matrix"),
        (torch.ones(2, 2), None, 0, ValueError, "rank must be at least 1, not 0"),
    ],
)
def test_what_has_no_answer_is_refused(a, gram, rank, error, message):
    with pytest.raises(error, match=message) as caught:
        weighted_svd(a, gram, rank)
    assert "\n" not in str(caught.value)
