from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import Matrix, allocate, break_even_rank, num_parameters, rank_for_ratio

POLICIES = ["uniform", "threshold", "svd-llm-v2", "welore"]
FORMS = ["plain", "pivoted"]


def model(seed=0, blocks=4):
    """A small language model: grouped-query shapes, spectra of different decay and scale."""
    generator = np.random.default_rng(seed)
    shapes = {"q": (48, 48), "k": (16, 48), "up": (128, 48), "down": (48, 128)}
    matrices = []
    for block, (kind, shape) in itertools.product(range(blocks), shapes.items()):
        decay, scale = generator.uniform(0.2, 1.5), generator.uniform(0.3, 3)
        s = scale * np.arange(1, min(shape) + 1) ** -decay * generator.uniform(0.8, 1.2, min(shape))
        matrices.append(Matrix(f"{block}.{kind}", shape, torch.from_numpy(np.sort(s)[::-1].copy()), kind))
    return matrices


def cost(matrix, rank, form):
    m, n = matrix.shape
    return m * n if rank == min(m, n) else num_parameters(m, n, rank, form)


def total_cost(matrices, ranks, form):
    return sum(cost(matrix, ranks[matrix.name], form) for matrix in matrices)


def energy(matrices, ranks):
    return sum(float(np.square(np.sort(m.spectrum.numpy())[::-1][: ranks[m.name]]).sum()) for m in matrices)


def admissible(matrix, form, minimum=1):
    m, n = matrix.shape
    end = break_even_rank(m, n, form)
    return [*range(min(minimum, end), end), min(m, n)]


@pytest.mark.parametrize(("ratio", "minimum"), [(0.01, 1), (0.2, 1), (0.2, 5), (0.5, 1), (0.8, 1), (0.8, 5), (0.9, 1)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", POLICIES)
def test_budget_is_met_and_almost_spent(policy, form, ratio, minimum):
    matrices = model()
    ranks = allocate(matrices, ratio, policy=policy, form=form, minimum=minimum)
    assert list(ranks) == [matrix.name for matrix in matrices]
    for matrix in matrices:
        assert ranks[matrix.name] in admissible(matrix, form, minimum)
    total = sum(math.prod(matrix.shape) for matrix in matrices)
    spent, budget = total_cost(matrices, ranks, form), (1 - ratio) * total
    assert spent <= budget
    # Rounding down costs each matrix less than one rank.
    assert spent >= budget - sum(sum(matrix.shape) for matrix in matrices)


@settings(max_examples=80, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=6),
    ratio=st.floats(0.01, 0.99),
    policy=st.sampled_from(POLICIES),
    form=st.sampled_from(FORMS),
    minimum=st.integers(1, 4),
    seed=st.integers(0, 999),
    kind=st.sampled_from(["random", "flat", "zero", "deficient"]),
)
def test_any_problem(shapes, ratio, policy, form, minimum, seed, kind):
    generator = np.random.default_rng(seed)
    matrices = []
    for index, shape in enumerate(shapes):
        s = generator.exponential(size=min(shape))
        s = {"random": s, "flat": s * 0 + 2, "zero": s * 0, "deficient": s * (s > 1)}[kind]
        matrices.append(Matrix(str(index), shape, torch.from_numpy(s), str(index % 2)))
    total = sum(math.prod(shape) for shape in shapes)
    least = sum(cost(matrix, admissible(matrix, form, minimum)[0], form) for matrix in matrices)
    if least > math.floor((1 - ratio) * total):
        with pytest.raises(ValueError, match=f"needs {least}; use a ratio of at most"):
            allocate(matrices, ratio, policy=policy, form=form, minimum=minimum)
        return
    ranks = allocate(matrices, ratio, policy=policy, form=form, minimum=minimum)
    assert total_cost(matrices, ranks, form) <= (1 - ratio) * total
    assert all(ranks[matrix.name] in admissible(matrix, form, minimum) for matrix in matrices)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_larger_ratio_never_keeps_more(policy, form):
    matrices = model(1)
    series = [allocate(matrices, ratio, policy=policy, form=form) for ratio in np.linspace(0.05, 0.85, 33)]
    spent = [total_cost(matrices, ranks, form) for ranks in series]
    kept = [energy(matrices, ranks) for ranks in series]
    assert all(a >= b for a, b in itertools.pairwise(spent))
    if policy in ("uniform", "welore"):  # one number decides, so every single rank falls with it
        for first, second in itertools.pairwise(series):
            assert all(first[name] >= second[name] for name in first)
    if policy != "svd-llm-v2":  # its scores change with the ratio
        assert all(a >= b for a, b in itertools.pairwise(kept))


@pytest.mark.parametrize("form", FORMS)
def test_uniform_is_the_same_ratio_for_each(form):
    matrices = [Matrix(m.name, m.shape) for m in model()]  # needs no spectra
    ranks = allocate(matrices, 0.3, policy="uniform", form=form)
    assert ranks == {m.name: rank_for_ratio(*m.shape, 0.3, form) for m in matrices}


def test_uniform_makes_up_for_the_minimum():
    # Rank 1 of the small matrix is more than its share, so the large one gives way.
    matrices = [Matrix("small", (3, 3)), Matrix("large", (40, 40))]
    assert rank_for_ratio(3, 3, 0.5, "plain") == 0
    ranks = allocate(matrices, 0.5, policy="uniform", form="plain")
    assert ranks["small"] == 1
    assert total_cost(matrices, ranks, "plain") <= 0.5 * 1609


def brute_force(matrices, budget, form):
    """The most energy over all combinations of ranks."""
    options = [[(cost(m, k, form), energy([m], {m.name: k})) for k in admissible(m, form)] for m in matrices]
    return max(
        sum(e for _, e in choice) for choice in itertools.product(*options) if sum(c for c, _ in choice) <= budget
    )


def tiny(seed):
    generator = np.random.default_rng(seed)
    shapes = [(9, 10), (12, 6), (8, 8)]
    return [
        Matrix(str(i), shape, torch.from_numpy(generator.exponential(size=min(shape)) ** generator.uniform(0.3, 2)))
        for i, shape in enumerate(shapes)
    ]


def relaxed(matrices, multiplier, form):
    """Each matrix on its own: the rank with the most energy - multiplier * cost."""

    def value(matrix, rank):
        return energy([matrix], {matrix.name: rank}) - multiplier * cost(matrix, rank, form)

    return {m.name: max(admissible(m, form), key=lambda rank, m=m: value(m, rank)) for m in matrices}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(8))
def test_threshold_is_optimal_at_every_budget_of_the_relaxation(seed, form):
    matrices = tiny(seed)
    total = sum(math.prod(m.shape) for m in matrices)
    seen = set()
    for multiplier in np.logspace(-4, 1, 60):
        budget = total_cost(matrices, relaxed(matrices, multiplier, form), form)
        if budget in seen or budget == total:
            continue
        seen.add(budget)
        ranks = allocate(matrices, 1 - (budget + 0.5) / total, policy="threshold", form=form)
        assert energy(matrices, ranks) == pytest.approx(brute_force(matrices, budget, form), rel=1e-12)
    assert len(seen) >= 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(8))
def test_threshold_is_close_to_optimal_at_every_budget(seed, form):
    matrices = tiny(seed)
    total = sum(math.prod(m.shape) for m in matrices)
    # The relaxation is optimal where an edge of a hull ends, so the loss is at most what the last edge would have
    # brought: the largest step in energy that one matrix makes as the multiplier falls.
    path = [relaxed(matrices, multiplier, form) for multiplier in np.logspace(2, -6, 300)]
    step = max(energy([m], after) - energy([m], before) for m in matrices for before, after in itertools.pairwise(path))
    losses = []
    for budget in range(60, total, 9):
        ranks = allocate(matrices, 1 - (budget + 0.5) / total, policy="threshold", form=form)
        best = brute_force(matrices, budget, form)
        assert -1e-12 <= best - energy(matrices, ranks) <= step
        losses.append(1 - energy(matrices, ranks) / best)
    assert np.mean(losses) < 0.01


def test_threshold_with_plain_factors_is_one_threshold():
    matrices = model(2)
    ranks = allocate(matrices, 0.6, policy="threshold", form="plain")
    factored = [m for m in matrices if ranks[m.name] < min(m.shape)]
    gain = {m.name: (m.spectrum**2 / sum(m.shape)).numpy() for m in factored}
    kept = min(gain[m.name][ranks[m.name] - 1] for m in factored if ranks[m.name] > 1)
    # Every rank left out is worth less than every rank kept, up to the few that no longer fitted or filled the rest.
    left_out = sorted((gain[m.name][ranks[m.name]] for m in factored), reverse=True)
    assert sum(value > kept * (1 + 1e-9) for value in left_out) <= 2


def test_threshold_keeps_more_energy_than_the_others():
    matrices = model(3)
    for form, ratio in itertools.product(FORMS, (0.2, 0.5, 0.8)):
        kept = {policy: energy(matrices, allocate(matrices, ratio, policy=policy, form=form)) for policy in POLICIES}
        assert max(kept, key=kept.__getitem__) == "threshold"


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_svd_llm_v2_does_not_depend_on_the_scale_of_a_group(scale):
    matrices = model(4)
    scaled = [Matrix(m.name, m.shape, m.spectrum * (scale if m.group == "q" else 1), m.group) for m in matrices]
    assert allocate(scaled, 0.4, policy="svd-llm-v2") == allocate(matrices, 0.4, policy="svd-llm-v2")


@pytest.mark.parametrize("form", FORMS)
def test_svd_llm_v2_follows_the_published_formula(form):
    # Where log(L) > 0, no removal is clipped and the shapes of a group agree, R_i = g R c_i / sum c with
    # c_i = 1 / log(L_i); dividing all L by min L / e only changes the logarithms, as done here by hand.
    generator = np.random.default_rng(0)
    matrices = [
        Matrix(str(i), (30, 40), torch.from_numpy(np.sort(generator.exponential(size=30))[::-1].copy() * (1 + i / 4)))
        for i in range(4)
    ]
    uniform = rank_for_ratio(30, 40, 0.4, form)
    loss = np.array([np.sqrt((m.spectrum.numpy()[uniform:] ** 2).sum()) for m in matrices])
    scores = 1 / np.log(math.e * loss / loss.min())
    removal = 4 * 0.4 * scores / scores.sum()
    assert removal.max() < 0.99
    expected = {m.name: rank_for_ratio(30, 40, r, form) for m, r in zip(matrices, removal, strict=True)}
    assert allocate(matrices, 0.4, policy="svd-llm-v2", form=form) == expected
    assert removal[0] > removal[-1]  # the matrix that loses most is cut least


def test_svd_llm_v2_keeps_the_share_of_each_group():
    matrices = model(5)
    ranks = allocate(matrices, 0.4, policy="svd-llm-v2")
    for group in ("q", "k", "up", "down"):
        members = [m for m in matrices if m.group == group]
        total = sum(math.prod(m.shape) for m in members)
        assert total_cost(members, ranks, "pivoted") == pytest.approx(
            0.6 * total, abs=sum(sum(m.shape) for m in members)
        )


def test_svd_llm_v2_with_lossless_members():
    # Two matrices lose nothing at the uniform rank (log 0 in the formula); they are cut most.
    s = torch.zeros(20)
    s[:2] = 1
    matrices = [Matrix("empty", (20, 20), s), Matrix("full", (20, 20), torch.ones(20)), Matrix("zero", (20, 20), s * 0)]
    ranks = allocate(matrices, 0.5, policy="svd-llm-v2")
    assert ranks["empty"] == ranks["zero"] < ranks["full"]


@pytest.mark.parametrize("form", FORMS)
def test_welore_is_one_threshold_on_normalised_values(form):
    matrices = model(6)
    ranks = allocate(matrices, 0.5, policy="welore", form=form)
    normalised = {}
    for m in matrices:
        s = m.spectrum.numpy()
        normalised[m.name] = (s - s.min()) / (s.max() - s.min())
    factored = [m for m in matrices if 1 < ranks[m.name] < min(m.shape)]
    kept = min(normalised[m.name][ranks[m.name] - 1] for m in factored)
    left_out = max(normalised[m.name][ranks[m.name]] for m in factored)
    assert left_out < kept
    # The next lower threshold would not fit.
    more = {}
    for m in matrices:
        count = max(1, int((normalised[m.name] >= left_out).sum()))
        more[m.name] = count if count in admissible(m, form) else min(m.shape)
    assert total_cost(matrices, more, form) > 0.5 * sum(math.prod(m.shape) for m in matrices)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("minimum", "maximum", "dense_from"), [(1, None, 0.5), (3, 12, 1.0), (2, 30, 0.4), (1, 7, 0.2)]
)
def test_ranks_keep_to_limits_and_the_budget_is_met(policy, form, minimum, maximum, dense_from):
    matrices = model(8)
    limits = {"minimum": minimum, "maximum": maximum, "dense_from": dense_from}
    for ratio in (0.2, 0.5, 0.8):
        ranks = allocate(matrices, ratio, policy=policy, form=form, **limits)
        assert total_cost(matrices, ranks, form) <= (1 - ratio) * sum(math.prod(m.shape) for m in matrices)
        for m in matrices:
            rank, size = ranks[m.name], min(m.shape)
            assert rank >= minimum
            assert rank == size or (rank < dense_from * size and rank <= (maximum or size))
            stays = min(dense_from * size, break_even_rank(*m.shape, form))
            assert rank < size or maximum is None or min(maximum, size) >= stays


def test_a_matrix_that_keeps_most_of_its_ranks_stays_dense_and_the_others_pay():
    flat, steep = torch.linspace(2, 1, 20), 2.0 ** -torch.arange(20.0)
    matrices = [Matrix("flat", (20, 20), flat), Matrix("steep", (20, 20), steep)]
    free = allocate(matrices, 0.2, policy="welore")
    assert 10 <= free["flat"] < 20
    held = allocate(matrices, 0.2, policy="welore", dense_from=0.5)
    assert held["flat"] == 20
    assert held["steep"] < free["steep"] or held["steep"] < 10
    assert 400 + num_parameters(20, 20, held["steep"]) <= 0.8 * 800


def test_a_spectrum_in_any_order_and_dtype():
    matrices = model(7)
    shuffled = [Matrix(m.name, m.shape, m.spectrum.flip(0).to(torch.float64), m.group) for m in matrices]
    for policy in POLICIES:
        assert allocate(shuffled, 0.4, policy=policy) == allocate(matrices, 0.4, policy=policy)
    half = [Matrix(m.name, m.shape, m.spectrum.bfloat16(), m.group) for m in matrices]
    allocate(half, 0.4, policy="threshold")


def test_nothing_to_share():
    assert allocate([], 0.5) == {}


ONE = Matrix("one", (4, 4), torch.ones(4))


@pytest.mark.parametrize(
    ("matrices", "ratio", "options", "message"),
    [
        ([ONE], 0.0, {}, "ratio is the fraction of parameters removed and lies between 0 and 1, not 0.0"),
        ([ONE], 1.0, {}, "ratio is the fraction"),
        ([ONE], float("nan"), {}, "ratio is the fraction"),
        ([ONE], 0.5, {"policy": "greedy"}, "policy must be one of uniform, threshold, svd-llm-v2, welore"),
        ([ONE], 0.5, {"form": "sparse"}, "form must be one of plain, pivoted"),
        ([ONE], 0.5, {"minimum": 0}, "minimum must be at least 1"),
        ([ONE], 0.5, {"minimum": 3, "maximum": 2}, "maximum must be at least the minimum 3, not 2"),
        ([ONE], 0.5, {"dense_from": 0.0}, "dense_from is a fraction of the ranks, above 0 to 1, not 0.0"),
        ([ONE, ONE], 0.5, {}, "two matrices are called 'one'"),
        ([Matrix("w", (4, 4))], 0.5, {"policy": "welore"}, 'w: policy "welore" needs the singular values'),
        ([Matrix("w", (4, 4), torch.ones(3))], 0.5, {"policy": "threshold"}, "w: the spectrum must be 4 finite values"),
        (
            [Matrix("w", (2, 2), torch.tensor([1.0, float("nan")]))],
            0.1,
            {"policy": "threshold"},
            "w: the spectrum must",
        ),
        ([Matrix("w", (2, 2), torch.tensor([1.0, -1.0]))], 0.1, {"policy": "svd-llm-v2"}, "w: the spectrum must be"),
        ([ONE], 0.9, {}, "ratio 0.9 leaves 1 parameters, but rank 1 everywhere needs 7; use a ratio of at most 0.5625"),
    ],
)
def test_bad_input(matrices, ratio, options, message):
    with pytest.raises(ValueError, match=message):
        allocate(matrices, ratio, **options)


def test_the_named_feasible_ratio_is_feasible():
    assert allocate([ONE], 0.5625) == {"one": 1}
