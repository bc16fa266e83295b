"""The oracle is the density, integrated numerically by scipy, and random matrices with planted singular values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError
from eckart.linalg.marchenko_pastur import (
    gavish_donoho_rank,
    gavish_donoho_threshold,
    marchenko_pastur_edge,
    marchenko_pastur_energy,
    marchenko_pastur_quantile,
    marchenko_pastur_rank,
    noise_level,
)

# Table IV of Gavish and Donoho, the coefficient for unknown noise by numerical integration.
PUBLISHED = {0.05: 1.5194, 0.1: 1.6089, 0.2: 1.7650, 0.3: 1.9061, 0.4: 2.0403, 0.5: 2.1711, 0.75: 2.5011, 1.0: 2.8582}


def noisy(m, n, s, sigma, known, seed=0):
    """Low rank plus noise, in units where the noise has its edge at sigma (√m + √n)."""
    noise = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.svdvals(known(m, n, s, seed) + sigma * noise)


def probability_below(t, beta):
    """The integral of the density, in the angle from its lower edge, where the integrand has no singularity."""
    root = math.sqrt(beta)
    gap = (1 - beta) / (1 + root)  # 1 - √β, without cancellation
    end = math.pi - math.acos(min(1, max(-1, (t - 1 - beta) / (2 * root))))

    def density(angle):
        half = math.sin(angle / 2)
        below = gap**2 + 4 * root * half**2
        return 2 / math.pi * math.sin(angle) ** 2 / below if below > 0 else 2 / math.pi

    # The density falls to zero within an angle of about the gap, which a rule for the whole can step over.
    inside = [place for k in range(13) if 0 < (place := gap * 10**k) < end]
    return scipy.integrate.quad(density, 0, end, epsabs=1e-13, epsrel=1e-12, limit=200, points=inside)[0]


@settings(max_examples=50, deadline=None)
@given(beta=st.floats(1e-6, 1), probability=st.floats(0.001, 1))
def test_quantile_is_where_the_density_integrates_to_the_probability(beta, probability):
    t = marchenko_pastur_quantile(beta, probability)
    assert (1 - math.sqrt(beta)) ** 2 - 1e-11 <= t <= (1 + math.sqrt(beta)) ** 2 + 1e-11
    # The angle of t is known to 1e-16 / sqrt(beta), and acos loses more at the ends.
    assert probability_below(t, beta) == pytest.approx(probability, abs=1e-9)


def test_the_density_itself():
    """The change of variable above, checked once against the published density."""
    beta = 0.3
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def density(t):
        return math.sqrt((high - t) * (t - low)) / (2 * math.pi * beta * t)

    assert scipy.integrate.quad(density, low, marchenko_pastur_quantile(beta))[0] == pytest.approx(0.5, abs=1e-8)


@pytest.mark.parametrize("beta", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.8, 1.0])
def test_energy_is_the_integral_of_the_values_above_the_quantile(beta, share):
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    start = marchenko_pastur_quantile(beta, 1 - share)

    def energy(t):  # t times the published density
        return math.sqrt(max(0.0, (high - t) * (t - low))) / (2 * math.pi * beta)

    assert marchenko_pastur_energy(beta, share) == pytest.approx(scipy.integrate.quad(energy, start, high)[0], abs=1e-6)


def test_square_matrices_have_the_quarter_circle():
    # P(s <= x) for the quarter circle on [0, 2]: (x sqrt(4 - x^2) / 2 + 2 asin(x / 2)) / pi
    for probability in (0.1, 0.5, 0.9):
        x = math.sqrt(marchenko_pastur_quantile(1.0, probability))
        assert (x * math.sqrt(4 - x * x) / 2 + 2 * math.asin(x / 2)) / math.pi == pytest.approx(probability, abs=1e-14)
    assert marchenko_pastur_quantile(1.0, 0.0) == pytest.approx(0, abs=1e-10)
    assert marchenko_pastur_quantile(1.0, 1.0) == 4


def test_published_coefficients():
    assert gavish_donoho_threshold(1.0) == pytest.approx(4 / math.sqrt(3), rel=1e-15)
    for beta, omega in PUBLISHED.items():
        # The published numbers rest on a median found to about 2e-4.
        assert gavish_donoho_threshold(beta, known_noise=False) == pytest.approx(omega, abs=4e-4)
        cubic = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43  # their fit, good to 0.02
        assert gavish_donoho_threshold(beta, known_noise=False) == pytest.approx(cubic, abs=0.02)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_the_threshold_is_where_keeping_and_dropping_cost_the_same(beta):
    """At x the value y = sqrt((x + 1/x)(x + beta/x)) is seen; dropping costs x^2, keeping x^2 + y^2 - 2 x y c1 c2."""

    def excess(y):
        middle = y * y - beta - 1
        x = math.sqrt((middle + math.sqrt(middle * middle - 4 * beta)) / 2)
        overlap = (x**4 - beta) / math.sqrt((x**4 + beta * x * x) * (x**4 + x * x))
        return y * y - 2 * x * y * overlap

    threshold = gavish_donoho_threshold(beta)
    assert excess(threshold) == pytest.approx(0, abs=1e-9)
    assert excess(threshold * 1.01) < 0 < excess(threshold * 0.99)


@pytest.mark.parametrize("scale", [1.0, 1e200, 1e-200])
@pytest.mark.parametrize(("m", "n"), [(200, 200), (150, 400), (400, 150), (300, 20)])
def test_planted_ranks_are_found(m, n, scale, known):
    sigma = 0.5
    edge = marchenko_pastur_edge((m, n), sigma)
    assert edge == pytest.approx(sigma * (math.sqrt(m) + math.sqrt(n)))
    s = noisy(m, n, [4 * edge, 3 * edge, 2 * edge], sigma, known) * scale
    # The relative error of a median of n values is about 1 / n.
    assert noise_level(s, (m, n)) == pytest.approx(sigma * scale, rel=0.02 if min(m, n) > 100 else 0.1)
    assert gavish_donoho_rank(s, (m, n)) == gavish_donoho_rank(s, (m, n), sigma * scale) == 3
    # The largest value of noise may exceed its edge by a percent; half a percent more noise hides it.
    assert marchenko_pastur_rank(s, (m, n), sigma * scale * 1.03) == 3
    assert 3 <= marchenko_pastur_rank(s, (m, n)) <= 4
    assert gavish_donoho_rank(s[:10], (m, n), sigma * scale) == 3, "with the noise known the leading values are enough"


def test_the_edge_is_exceeded_by_noise_about_one_time_in_six():
    hits = [
        marchenko_pastur_rank(torch.linalg.svdvals(torch.from_numpy(z)), (80, 80), 1.0) > 0
        for z in np.random.default_rng(0).standard_normal((200, 80, 80))
    ]
    assert 0.08 < np.mean(hits) < 0.26  # P(Tracy-Widom > 0) = 0.17; three standard errors


def test_gavish_and_donoho_keep_fewer_than_the_edge(known):
    shape = (200, 200)
    edge = marchenko_pastur_edge(shape)
    s = [edge * 1.1, edge * 1.05, edge * 0.9]
    assert marchenko_pastur_rank(s, shape, 1.0) == 2
    assert gavish_donoho_rank(s, shape, 1.0) == 0
    assert gavish_donoho_rank([edge * 1.16, edge * 1.15], shape, 1.0) == 1  # 4 / √3 / 2 = 1.1547


def test_noise_level_of_an_even_number_is_between_the_middle_two():
    assert noise_level([4.0, 3.0, 1.0, 0.0], (4, 4)) == pytest.approx(
        2 / math.sqrt(4 * marchenko_pastur_quantile(1.0)), rel=1e-14
    )
    assert noise_level([9.0, 2.0, 0.0], (3, 7)) == pytest.approx(
        2 / math.sqrt(7 * marchenko_pastur_quantile(3 / 7)), rel=1e-14
    )


def test_no_noise_at_all():
    s = [3.0, 2.0, 0.0, 0.0, 0.0]
    assert noise_level(s, (5, 9)) == 0
    assert marchenko_pastur_rank(s, (5, 9)) == gavish_donoho_rank(s, (5, 9)) == 2
    assert marchenko_pastur_rank([0.0], (1, 3)) == gavish_donoho_rank([0.0], (1, 3)) == 0


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 30), n=st.integers(1, 30), seed=st.integers(0, 99), kind=st.sampled_from(["noise", "flat", "zero"])
)
def test_any_spectrum(m, n, seed, kind):
    s = np.random.default_rng(seed).exponential(size=min(m, n))
    s = {"noise": s, "flat": s * 0 + 2, "zero": s * 0}[kind].tolist()
    for rule in (marchenko_pastur_rank, gavish_donoho_rank):
        rank = rule(s, (m, n))
        assert rank == rule(s[::-1], (n, m))
        assert 0 <= rank <= min(m, n) // 2, "half of the values are at or below the median"
        assert rule(s, (m, n), 0.0) == sum(x > 0 for x in s)
    assert gavish_donoho_rank(s, (m, n), 1.0) <= marchenko_pastur_rank(s, (m, n), 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: marchenko_pastur_energy(0.5, 1.5), ValueError, "probability must be between 0 and 1"),
        (lambda: marchenko_pastur_quantile(0.0), ValueError, "beta is the shorter side over the longer one"),
        (lambda: gavish_donoho_threshold(1.1), ValueError, "beta is the shorter side"),
        (lambda: marchenko_pastur_quantile(0.5, 1.5), ValueError, "probability must be between 0 and 1"),
        (lambda: marchenko_pastur_edge((0, 3)), ValueError, "shape must be two sides of at least 1"),
        (lambda: marchenko_pastur_edge((2, 3), -1.0), ValueError, "sigma must be a finite number of at least 0"),
        (lambda: gavish_donoho_rank([1.0], (1, 1), math.inf), ValueError, "sigma must be a finite number"),
        (lambda: noise_level([1.0], (2, 3)), LinalgError, "does not hold the 2 singular values.*give all of them"),
        (lambda: gavish_donoho_rank([1.0], (2, 3)), LinalgError, "does not hold the 2 singular values"),
        (lambda: marchenko_pastur_rank([1.0] * 3, (2, 3), 1.0), LinalgError, "give no more than that"),
        (lambda: marchenko_pastur_rank([math.nan], (1, 3)), LinalgError, "not a one-dimensional spectrum"),
    ],
)
def test_what_has_no_answer_is_refused(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
