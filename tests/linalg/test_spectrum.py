from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError, effective_rank
from eckart.linalg.rank import energy_rank
from eckart.linalg.spectrum import explained_variance_ratio, spectral_entropy

SPECTRA = st.lists(st.floats(0, 1e3).map(lambda x: round(x, 3)), min_size=1, max_size=12)


def entropy(p):
    p = np.asarray(p, dtype=np.float64)
    p = p[p > 0] / p.sum()
    return -(p * np.log(p)).sum()


@settings(max_examples=25, deadline=None)
@given(s=SPECTRA, power=st.sampled_from([0.5, 1.0, 2.0, 3.0]), normalized=st.booleans())
def test_entropy_is_that_of_the_powers(s, power, normalized):
    truth = entropy(np.power(s, power)) if any(s) else 0.0
    if normalized and len(s) > 1:
        truth /= math.log(len(s))
    assert spectral_entropy(s, power=power, normalized=normalized) == pytest.approx(truth, abs=1e-12)


def test_matrix_entropy_is_that_of_the_gram_eigenvalues():
    x = np.random.default_rng(0).standard_normal((20, 8))
    values = np.linalg.eigvalsh(x.T @ x / np.trace(x.T @ x))
    s = torch.linalg.svdvals(torch.from_numpy(x))
    assert spectral_entropy(s) == pytest.approx(entropy(values), rel=1e-12)
    assert spectral_entropy(s, normalized=True) == pytest.approx(entropy(values) / math.log(8), rel=1e-12)


def test_effective_rank_is_the_exponential_of_the_entropy():
    s = [5.0, 2.0, 0.5, 0.0]
    assert effective_rank(s) == pytest.approx(math.exp(spectral_entropy(s, power=1)), rel=1e-14)
    assert spectral_entropy([7.0]) == spectral_entropy([]) == spectral_entropy([0.0, 0.0], normalized=True) == 0
    assert math.copysign(1, spectral_entropy([7.0])) == 1, "no negative zero"


@settings(max_examples=25, deadline=None)
@given(s=SPECTRA, more=st.floats(0, 1e3))
def test_explained_variance_is_the_share_of_the_squares(s, more):
    squares = np.sort(np.square(s))[::-1]
    total = float(squares.sum())
    whole = explained_variance_ratio(s)
    np.testing.assert_allclose(whole, squares / (total or 1), rtol=1e-12)
    assert float(whole.sum()) == pytest.approx(1 if total else 0)
    part = explained_variance_ratio(s, total=total + more)
    np.testing.assert_allclose(part, squares / (total + more or 1), rtol=1e-12)


def test_explained_variance_is_that_of_principal_components():
    x = np.random.default_rng(1).standard_normal((50, 6)) @ np.diag([5, 3, 2, 1, 1, 0.5]) + 7
    centred = x - x.mean(axis=0)
    variances = np.sort(np.linalg.eigvalsh(np.cov(x.T)))[::-1]
    s = np.linalg.svd(centred, compute_uv=False)
    np.testing.assert_allclose(explained_variance_ratio(torch.from_numpy(s)), variances / variances.sum(), rtol=1e-10)
    leading = explained_variance_ratio(s[:2].tolist(), total=float((centred**2).sum()))
    np.testing.assert_allclose(leading, variances[:2] / variances.sum(), rtol=1e-10)


@pytest.mark.parametrize("scale", [1e300, 1e-300])
def test_no_scale(scale):
    s = torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    assert spectral_entropy(s * scale) == pytest.approx(spectral_entropy(s), rel=1e-12)
    torch.testing.assert_close(explained_variance_ratio(s * scale), explained_variance_ratio(s))
    assert energy_rank(s * scale, 0.8, power=1) == energy_rank(s, 0.8, power=1) == 2


def test_energy_by_the_nuclear_norm():
    assert [energy_rank([6.0, 3.0, 1.0], 0.85, power=p) for p in (1, 2)] == [2, 2]
    assert [energy_rank([6.0, 3.0, 1.0], 0.75, power=p) for p in (1, 2)] == [2, 1]  # 6 / 10 and 36 / 46


@pytest.mark.parametrize("rule", [spectral_entropy, explained_variance_ratio])
@pytest.mark.parametrize("s", [[1.0, float("nan")], [1.0, float("inf")], [1.0, -1.0], torch.ones(2, 2)])
def test_no_spectrum_is_an_error(s, rule):
    with pytest.raises(LinalgError, match="not a one-dimensional spectrum of finite values >= 0"):
        rule(s)


@pytest.mark.parametrize("power", [0, -1, float("inf"), float("nan")])
def test_bad_powers(power):
    for call in (lambda: spectral_entropy([1.0], power=power), lambda: energy_rank([1.0], 0.5, power=power)):
        with pytest.raises(ValueError, match="power must be a positive number"):
            call()


@pytest.mark.parametrize("total", [3.9, -1.0, float("inf"), float("nan")])
def test_a_total_below_its_parts(total):
    with pytest.raises(ValueError, match="total must be a finite number, at least the energy"):
        explained_variance_ratio([2.0, 0.0], total=total)
