from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg.transforms import DCT, dct, dct_matrix, idct

LENGTHS = [1, 2, 3, 4, 5, 7, 8, 20, 97, 128, 1000, 1021, 4096]


@pytest.mark.parametrize("n", LENGTHS)
def test_against_scipy(n):
    x = np.random.default_rng(n).standard_normal((3, n))
    # Both lose a few units of rounding, growing like log n.
    assert np.allclose(dct(torch.from_numpy(x)).numpy(), scipy.fft.dct(x, norm="ortho"), rtol=0, atol=1e-14)
    assert np.allclose(idct(torch.from_numpy(x)).numpy(), scipy.fft.idct(x, norm="ortho"), rtol=0, atol=1e-14)


def test_two_dimensions_against_scipy():
    x = np.random.default_rng(0).standard_normal((5, 12, 9))
    ours = dct(dct(torch.from_numpy(x), dim=0), dim=1)
    assert np.allclose(ours.numpy(), scipy.fft.dctn(x, axes=(0, 1), norm="ortho"), rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", [128, 1021, 4096])
def test_float32_is_as_accurate_as_scipy(n):
    x = np.random.default_rng(n).standard_normal((4, n)).astype(np.float32)
    truth = scipy.fft.dct(x.astype(np.float64), norm="ortho")
    theirs = np.linalg.norm(scipy.fft.dct(x, norm="ortho") - truth)
    ours = np.linalg.norm(dct(torch.from_numpy(x)).numpy() - truth)
    assert ours <= 3 * theirs


@pytest.mark.parametrize("n", [1, 2, 3, 64, 97])
def test_matrix_diagonalises_the_second_difference(n):
    """Independent of any transform: eigenvectors of -x_(j-1) + 2 x_j - x_(j+1) with reflecting ends."""
    difference = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    difference[0, 0] -= 1
    difference[-1, -1] -= 1
    q = dct_matrix(n, dtype=torch.float64).numpy()
    eigenvalues = 2 - 2 * np.cos(np.pi * np.arange(n) / n)
    assert np.allclose(q @ difference @ q.T, np.diag(eigenvalues), rtol=0, atol=1e-14)
    assert (q[:, 0] > 0).all()


@pytest.mark.parametrize("n", [7, 1000])
def test_every_entry_of_the_matrix_is_rounded_once(n):
    index = np.arange(n, dtype=np.longdouble)
    pi = 4 * np.arctan(np.longdouble(1))
    truth = np.cos(pi * np.outer(index, 2 * index + 1) / (2 * n)) * np.sqrt(np.longdouble(2) / n)
    truth[0] = np.sqrt(np.longdouble(1) / n)
    # The angle in [0, 2 pi) is off by up to one unit in its last place, 4.4e-16, and so is the cosine.
    error = np.abs(dct_matrix(n, dtype=torch.float64).numpy() - truth).max()
    assert error <= 1.5e-15 * math.sqrt(2 / n)


def test_matrix_and_transform_agree():
    for n in (1, 2, 5, 16, 97):
        assert torch.allclose(DCT().matrix(n, dtype=torch.float64), dct_matrix(n, dtype=torch.float64), atol=1e-14)
    assert dct_matrix(3).dtype == torch.float32
    assert dct_matrix(3, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_largest_columns_are_the_best_projection():
    """What an optimizer relies on that keeps r columns of G Q: they lose the dropped columns, no others lose less."""
    gradient = torch.randn(6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns, q = idct(gradient), dct_matrix(7, dtype=torch.float64)
    assert torch.allclose(columns, gradient @ q, atol=1e-14)
    lost = {
        kept: float((gradient - columns[:, kept] @ q[:, kept].mT).square().sum())
        for kept in itertools.combinations(range(7), 3)
    }
    largest = tuple(sorted(columns.norm(dim=0).topk(3).indices.tolist()))
    assert lost[largest] == min(lost.values())
    dropped = [i for i in range(7) if i not in largest]
    assert lost[largest] == pytest.approx(float(columns[:, dropped].square().sum()), rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 300), frequency=st.integers(0, 299))
def test_a_cosine_has_one_coefficient(n, frequency):
    k = frequency % n
    x = torch.cos(math.pi * k * (2 * torch.arange(n, dtype=torch.float64) + 1) / (2 * n))
    expected = torch.zeros(n, dtype=torch.float64)
    expected[k] = x.norm()
    # The cosine of an angle up to n pi is off by n * 1e-16.
    assert torch.allclose(dct(x), expected, rtol=0, atol=1e-15 * n * math.sqrt(n) + 1e-15)


@pytest.mark.parametrize("n", [0, -1])
def test_bad_length(n):
    with pytest.raises(ValueError, match="n must be at least 1"):
        dct_matrix(n)
