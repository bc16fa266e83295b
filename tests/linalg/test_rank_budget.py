from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError
from eckart.linalg.rank_budget import explained_variance_ranks, welore_ranks

METRICS = ["ratio", "raw", "sum", "max"]


def layers(seed, sizes, kind="random"):
    generator = np.random.default_rng(seed)
    spectra = []
    for size in sizes:
        s = generator.exponential(size=size) * generator.uniform(0.1, 10)
        spectra.append({"random": s, "flat": s * 0 + 2, "zero": s * 0, "deficient": s * (s > 1)}[kind].tolist())
    return spectra


def pooled_ranks(spectra, budget, rho, metric):
    """EVA step 5 as it stands on the page: pool, sort, count."""
    cap = max(round(rho * budget / len(spectra)), math.ceil(budget / len(spectra)))
    pool = []
    for index, s in enumerate(spectra):
        variance = np.sort(np.square(s))[::-1]
        value = {
            "raw": variance,
            "ratio": variance / (variance.sum() or 1),
            "sum": variance / (variance[:cap].sum() or 1),
            "max": variance / (variance.max(initial=0) or 1),
        }[metric]
        pool += [(-x, index) for x in value[:cap]]
    pool.sort(key=lambda pair: pair[0])  # stable: ties in the order of the layers
    kept = [index for _, index in pool[:budget]]
    return [kept.count(index) for index in range(len(spectra))]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(8, 20), min_size=1, max_size=5),
    base=st.integers(0, 4),
    rho=st.sampled_from([1.0, 1.5, 2.0]),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["random", "flat", "zero", "deficient"]),
)
def test_eva_against_the_page(sizes, base, rho, metric, seed, kind):
    spectra = layers(seed, sizes, kind)
    budget = base * len(sizes)
    ranks = explained_variance_ranks(spectra, budget, rho, metric=metric)
    assert sum(ranks) == budget
    assert all(0 <= rank <= max(base, round(rho * base)) for rank in ranks)
    if kind != "flat":  # whose equal values differ by rounding, here and there
        assert ranks == pooled_ranks(spectra, budget, rho, metric)
    if rho == 1:
        assert ranks == [base] * len(sizes)


@pytest.mark.parametrize("metric", METRICS)
def test_eva_on_random_layers(metric):
    spectra = layers(3, [16, 12, 20, 16])
    assert explained_variance_ranks(spectra, 24, 2.0, metric=metric) == pooled_ranks(spectra, 24, 2.0, metric)


def test_eva_example():
    """Two layers, ratios (0.7, 0.2, 0.1) and (0.4, 0.3, 0.3): the four largest are 0.7, 0.4, 0.3, 0.3."""
    first, second = (torch.tensor(p).sqrt() for p in ([0.7, 0.2, 0.1], [0.4, 0.3, 0.3]))
    assert explained_variance_ranks([first, second], 4, 2.0) == [1, 3]
    assert explained_variance_ranks([first, second], 4, 1.0) == [2, 2]
    assert explained_variance_ranks([first, second], 4, 1.5) == [1, 3]
    # Scale matters for "raw" only.
    assert explained_variance_ranks([first * 10, second], 4, 2.0) == [1, 3]
    assert explained_variance_ranks([first * 10, second], 4, 2.0, metric="raw") == [3, 1]
    # Layers with equal inputs get equal ranks, up to a tie.
    assert explained_variance_ranks([second, second, first], 6, 2.0) == [3, 2, 1]


def test_eva_budget_that_does_not_divide():
    assert explained_variance_ranks([[3.0, 2.0, 1.0]] * 4, 10, 1.0) == [3, 3, 2, 2]
    assert explained_variance_ranks([], 0) == []
    assert explained_variance_ranks([[1.0], [2.0]], 0) == [0, 0]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    reduction=st.floats(0, 0.99),
    minimum=st.integers(1, 3),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["random", "flat", "zero", "deficient"]),
)
def test_welore_is_one_threshold(sizes, reduction, minimum, seed, kind):
    spectra = layers(seed, sizes, kind)
    ranks = welore_ranks(spectra, reduction, minimum=minimum)
    normalised = []
    for s in map(np.array, spectra):
        width = s.max() - s.min()
        normalised.append((s - s.min()) / width if width > 0 else (s > 0).astype(float))
    least = [min(minimum, size) for size in sizes]
    budget = max(math.floor((1 - reduction) * sum(sizes)), sum(least))
    assert sum(ranks) <= budget
    # Among all thresholds that meet the budget it is the one that keeps the most.
    choices = [
        [max(int((s >= kappa).sum()), k) for s, k in zip(normalised, least, strict=True)]
        for kappa in [*np.concatenate(normalised).tolist(), 2.0]
    ]
    assert ranks in choices
    assert sum(ranks) == max(sum(choice) for choice in choices if sum(choice) <= budget)


def test_welore_target_is_met_within_one():
    spectra = layers(0, [40, 30, 50])
    for reduction in (0.1, 0.3, 0.5, 0.7):
        ranks = welore_ranks(spectra, reduction)
        assert 0 <= (1 - reduction) * 120 - sum(ranks) < 1 + 1e-9
    assert welore_ranks(spectra, 0.0) == [40, 30, 50]
    more, fewer = welore_ranks(spectra, 0.2), welore_ranks(spectra, 0.6)
    assert all(a >= b for a, b in zip(more, fewer, strict=True)), "ranks fall with the threshold"
    assert welore_ranks([], 0.5) == []
    # The threshold does not see the scale of a layer.
    assert welore_ranks([[1e30 * x for x in spectra[0]], *spectra[1:]], 0.5) == welore_ranks(spectra, 0.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: explained_variance_ranks([[1.0]], 2), ValueError, "budget must be between 0 and 1, the values within"),
        (lambda: explained_variance_ranks([[1.0]], -1), ValueError, "budget must be between 0 and"),
        (lambda: explained_variance_ranks([[1.0]], 1, 0.5), ValueError, "rho must be a finite number of at least 1"),
        (lambda: explained_variance_ranks([[1.0]], 1, metric="mean"), ValueError, "metric must be one of ratio, raw"),
        (lambda: explained_variance_ranks([[1.0], [math.nan]], 1), LinalgError, r"spectra\[1\]: .*not a one-dimens"),
        (lambda: welore_ranks([[1.0]], 1.0), ValueError, "reduction is the fraction of the ranks removed"),
        (lambda: welore_ranks([[1.0]], 0.5, minimum=0), ValueError, "minimum must be at least 1"),
        (lambda: welore_ranks([[-1.0]], 0.5), LinalgError, r"spectra\[0\]: .*not a one-dimensional"),
    ],
)
def test_what_has_no_answer_is_refused(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
