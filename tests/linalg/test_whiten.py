from __future__ import annotations

import numpy as np
import pytest
import torch

from eckart.linalg import LinalgError, svd, whiten

FORMS = ["eigen", "cholesky"]
EPS = torch.finfo(torch.float64).eps


def check(result, gram, *, shrinkage=None):
    """S Sᵀ = G + shrinkage * mean(diag G) * I and S S^-1 = I, in float64."""
    gram = gram.double()
    n = gram.shape[-1]
    scale = float(gram.diagonal().mean())
    eye = torch.eye(n, dtype=torch.float64)
    assert result.factor.dtype == result.inverse.dtype == torch.float64
    added = result.shrinkage if shrinkage is None else shrinkage
    assert torch.allclose(
        result.factor @ result.factor.T / scale, gram / scale + added * eye, atol=100 * n * EPS, rtol=1e-12
    )
    # The product S S^-1 is off by eps * cond(S), and cond(S)^2 <= 1 / (n eps).
    condition = float(torch.linalg.cond(result.factor))
    # The eigenvalue that is lifted is itself only known to a few eps * l_1, against the n eps * l_1 that are added.
    assert condition**2 <= (1 + 3 / n) / (n * EPS)
    assert (result.factor @ result.inverse - eye).abs().max() < 20 * n * EPS * condition
    assert (result.inverse @ result.factor - eye).abs().max() < 20 * n * EPS * condition


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_well_conditioned_gram_is_factored_as_it_is(form, dtype):
    x = torch.randn(60, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = (x.T @ x).to(dtype)
    result = whiten(gram, form=form)
    check(result, gram, shrinkage=0.0)
    assert (result.shrinkage, result.rank) == (0.0, 12)


def test_forms(known_gram):
    gram = known_gram(8, np.arange(1, 9))
    lower, symmetric = whiten(gram, form="cholesky").factor, whiten(gram).factor
    assert torch.allclose(lower, torch.from_numpy(np.linalg.cholesky(gram.numpy())), atol=1e-14)
    assert torch.allclose(symmetric, symmetric.T, atol=1e-14)
    assert np.allclose(np.linalg.eigvalsh(symmetric.numpy()), np.sqrt(np.arange(1, 9)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 3, 9])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30, 1e300])
def test_singular_gram_is_shrunk_as_little_as_promised(form, rank, scale, known_gram):
    gram = known_gram(10, [*np.linspace(1, 2, rank), *np.zeros(10 - rank)]) * scale
    result = whiten(gram, form=form)
    check(result, gram)
    assert result.rank == rank
    # least shrinkage: l_1 n eps up to the rounding of the zero eigenvalues; Cholesky may need a few times more
    least = float(torch.linalg.eigvalsh(gram)[-1]) * 10 * EPS / float(gram.diagonal().mean())
    assert 0 < result.shrinkage <= 10 * least
    if rank == 9:
        assert result.shrinkage >= 0.1 * least


@pytest.mark.parametrize("form", FORMS)
def test_nearly_singular_gram_meets_the_condition_bound(form, known_gram):
    gram = known_gram(30, np.logspace(0, -17, 30))
    result = whiten(gram, form=form)
    check(result, gram)
    assert 0 < result.shrinkage < 1e-11


@pytest.mark.parametrize("form", FORMS)
def test_float32_accumulation_noise_is_lifted(form):
    x = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    gram = x.T @ x  # rank 20, eigenvalues of about -1e-6 from rounding
    assert float(torch.linalg.eigvalsh(gram.double())[0]) < 0
    check(whiten(gram, form=form), gram)


@pytest.mark.parametrize("form", FORMS)
def test_given_shrinkage(form, known_gram):
    gram = known_gram(6, [3, 2, 1, 0, 0, 0])
    result = whiten(gram, form=form, shrinkage=0.01)
    check(result, gram, shrinkage=0.01)
    assert result.shrinkage == pytest.approx(0.01)
    with pytest.raises(LinalgError, match=r'singular with shrinkage 0.*use shrinkage="auto"'):
        whiten(gram, form=form, shrinkage=0.0)


@pytest.mark.parametrize("form", FORMS)
def test_loss_of_a_whitened_truncation_is_the_tail(form):
    # What whitening is for: ||X (W - W_k)ᵀ||_F^2 = sum of s_i^2 beyond k, s of W S.
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((200, 12), (9, 12)))
    x = x * torch.logspace(0, -3, 12, dtype=torch.float64)
    result = whiten(x.T @ x, form=form)
    u, s, vh, error = svd(w @ result.factor, 4, driver="exact")
    truncated = (u * s) @ vh @ result.inverse
    assert float((x @ (w - truncated).T).norm()) == pytest.approx(float(error), rel=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_batch_equals_one_by_one(form, known_gram):
    grams = [known_gram(5, [5, 4, 3, 2, 1], 1) * 1e200, known_gram(5, [5, 4, 3, 0, 0], 2), torch.eye(5).double()]
    batch = whiten(torch.stack(grams), form=form)
    single = [whiten(gram, form=form) for gram in grams]
    for i, one in enumerate(single):
        # Of a singular Gram the factor holds square roots of rounding, so its square is compared: see test_eigh.py.
        squares = [factor @ factor.mT / float(one.factor.abs().max()) ** 2 for factor in (batch.factor[i], one.factor)]
        assert torch.allclose(*squares, rtol=1e-12, atol=1e-14)
        check(one, grams[i])
    assert batch.shrinkage == pytest.approx(max(one.shrinkage for one in single))
    assert batch.rank == 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.zeros(4, 4), "is zero .*calibrate with data that reaches this layer"),
        (torch.zeros(0, 0), "is zero"),
        (torch.stack([torch.eye(3), torch.zeros(3, 3)]), "is zero"),
        (torch.diag(torch.tensor([3.0, 2.0, -1.0])), "is not positive semidefinite"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "is not symmetric"),
        (torch.ones(3, 2), "is not square"),
        (torch.full((2, 2), float("inf")), "contains NaN or Inf"),
    ],
)
def test_no_right_answer_is_an_error(gram, message, form):
    with pytest.raises(LinalgError, match=message):
        whiten(gram, form=form)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"form": "qr"}, "form must be one of eigen, cholesky"), ({"shrinkage": -1.0}, "shrinkage must be")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        whiten(torch.eye(2), **options)
