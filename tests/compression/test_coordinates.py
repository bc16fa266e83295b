"""Coordinate search over shares: the total is kept, the starts are never lost, and a known optimum is found."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from eckart.compression.coordinates import coordinate_search, moved

SIZES = {"a": 100, "b": 300, "c": 50, "d": 200}


def kept(seed: int) -> dict[str, float]:
    drawn = 0.1 + 0.9 * torch.rand(len(SIZES), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return dict(zip(SIZES, drawn.tolist(), strict=True))


def numbers(shares: dict[str, float]) -> float:
    return sum(shares[name] * SIZES[name] for name in SIZES)


@pytest.mark.parametrize("factor", [0.2, 0.9, 1.1, 3.0])
@pytest.mark.parametrize("group", [["a"], ["b", "c"], ["a", "b", "d"]])
@pytest.mark.parametrize("seed", range(4))
def test_the_total_is_met_and_the_others_keep_their_proportions(group, factor, seed):
    start = kept(seed)
    inside = {name: min(1.0, factor * start[name]) for name in group}

    def at(t: float) -> dict[str, float]:
        return {name: inside.get(name, min(1.0, t * start[name])) for name in SIZES}

    found = moved(start, group, factor, SIZES, numbers(start))
    low, high = 0.0, 1 / min(start.values())
    if not numbers(at(low)) < numbers(start) <= numbers(at(high)):
        assert found is None
        return
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if numbers(at(middle)) < numbers(start) else (low, middle)
    assert numbers(found) == pytest.approx(numbers(start), rel=1e-12)
    assert found == pytest.approx(at(high), rel=1e-9)


@pytest.mark.parametrize(("group", "factor"), [(["a", "b", "c", "d"], 0.9), (["b"], 9.0), (["a", "b", "d"], 0.01)])
def test_what_the_others_cannot_make_up_for_is_none(group, factor):
    assert moved(dict.fromkeys(SIZES, 0.3), group, factor, SIZES, 0.3 * sum(SIZES.values())) is None


def separable(shares: dict[str, float]) -> float:
    """sum_l w_l / kept_l: the least is at kept_l ~ sqrt(w_l / size_l)."""
    return sum(weight / shares[name] for name, weight in zip(SIZES, (1.0, 5.0, 2.0, 0.5), strict=True))


def test_the_optimum_of_a_separable_loss_is_found():
    total = 0.4 * sum(SIZES.values())
    ideal = {name: math.sqrt(w / SIZES[name]) for name, w in zip(SIZES, (1.0, 5.0, 2.0, 0.5), strict=True)}
    ideal = {name: fraction * total / numbers(ideal) for name, fraction in ideal.items()}
    assert max(ideal.values()) < 1  # no bound is active, so the formula is the optimum
    start = dict.fromkeys(SIZES, 0.4)
    found, losses = coordinate_search([start], [[name] for name in SIZES], SIZES, total, separable, 200)
    assert separable(found) == pytest.approx(separable(ideal), rel=1e-4)
    assert numbers(found) == pytest.approx(total, rel=1e-9)
    assert min(losses) == separable(found) < losses[0]


@pytest.mark.parametrize("evaluations", [1, 2, 3, 7])
def test_never_more_trials_and_never_worse_than_a_start(evaluations):
    starts = [kept(0), kept(1), kept(2)]
    tried: list[dict[str, float]] = []

    def loss(shares: dict[str, float]) -> float:
        tried.append(dict(shares))
        return separable(shares)

    found, losses = coordinate_search(starts, [["a"], ["b"]], SIZES, 300, loss, evaluations)
    assert len(tried) == len(losses) == evaluations
    assert tried[: len(starts)] == starts[:evaluations]
    assert separable(found) == min(losses) == min(map(separable, tried))


def test_every_outcome_is_tried_once_and_the_search_ends():
    """Where shares are whole tenths there are few outcomes, and then nothing is left to try."""
    seen: list[tuple[int, ...]] = []

    def key(shares: dict[str, float]) -> tuple[int, ...]:
        return tuple(int(10 * fraction) for fraction in shares.values())

    def loss(shares: dict[str, float]) -> float:
        seen.append(key(shares))
        return separable(shares)

    start = dict.fromkeys(SIZES, 0.45)
    _, losses = coordinate_search([start, start], [["a"], ["b"]], SIZES, numbers(start), loss, 10_000, key=key)
    assert len(seen) == len(set(seen)) == len(losses) < 100


def test_what_fails_is_never_chosen():
    losses = itertools.chain([math.inf, 2.0], itertools.repeat(math.inf))
    starts = [kept(0), kept(1)]
    found, tried = coordinate_search(starts, [["a"], ["b"]], SIZES, 300, lambda _: next(losses), 6)
    assert found == starts[1]
    assert tried[:2] == [math.inf, 2.0]
