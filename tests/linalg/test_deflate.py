"""Splitting off outliers: what is left is resolved as if they were not there, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eckart.linalg._deflate import eigh_without_outliers

EPS = torch.finfo(torch.float32).eps


def coupling(gram: torch.Tensor, vectors: torch.Tensor, kept: int) -> float:
    """Norm of the block that ties kept directions, outliers aside, to dropped ones; 0 for exact eigenvectors."""
    u = vectors.double()
    return float((u[:, 4:kept].mT @ gram @ u[:, kept:]).norm())


@pytest.mark.parametrize("outliers", [[30.0], [1e3], [1e3, 300.0], [1e4, 1e4, 1e4]], ids=str)
def test_the_rest_is_resolved_to_its_own_rounding(outliers, known_gram):
    values = [*outliers, *(1 / np.arange(1, 201 - len(outliers)))]
    gram = known_gram(200, values)
    found, vectors = eigh_without_outliers(gram.float())
    assert np.abs(found.double().numpy() - values).max() < 20 * EPS * values[0]
    assert float((vectors.mT @ vectors - torch.eye(200)).abs().max()) < 20 * EPS
    # LAPACK in float32 errs by eps * l_1 here; what is left of that is the rounding of the matrix itself.
    plain = torch.linalg.eigh(gram.float()).eigenvectors.flip(1)
    rounding = float((gram.float().double() - gram).norm())
    assert coupling(gram, vectors, 100) < min(coupling(gram, plain, 100), 3 * rounding + 20 * EPS)


@pytest.mark.parametrize(
    "values",
    [np.ones(200), 1 / np.arange(1, 201), [*np.ones(5), *np.zeros(195)], np.zeros(200), [1.0, *np.zeros(199)]],
    ids=["identity", "power law", "rank 5", "zero", "rank 1"],
)
def test_other_spectra_are_as_accurate_as_lapack(values, known_gram):
    gram = known_gram(200, values)
    found, vectors = eigh_without_outliers(gram.float())
    assert np.abs(found.double().numpy() - np.asarray(values)).max() <= 50 * EPS * max(values)  # LAPACK itself: 27
    assert float((vectors.mT @ vectors - torch.eye(200)).abs().max()) < 20 * EPS
    residual = gram @ vectors.double() - vectors.double() * found.double()
    assert float(residual.norm()) <= 200 * EPS * max(values)  # of 200 vectors together


def test_float64_and_small_matrices_go_to_lapack(known_gram):
    for gram in (known_gram(150, np.arange(1, 151)), known_gram(20, np.arange(1, 21)).float()):
        found, vectors = eigh_without_outliers(gram)
        expected = torch.linalg.eigh(gram)
        assert torch.equal(found, expected.eigenvalues.flip(0))
        assert torch.equal(vectors, expected.eigenvectors.flip(1))
