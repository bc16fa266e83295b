from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eckart.linalg import (
    LinalgError,
    break_even_rank,
    effective_rank,
    elbow_rank,
    energy_at,
    energy_rank,
    num_parameters,
    rank_for_parameters,
    rank_for_ratio,
    stable_rank,
)

FORMS = ["plain", "pivoted"]
SIZES = st.integers(1, 200)


@given(m=SIZES, n=SIZES, form=st.sampled_from(FORMS))
def test_break_even_is_where_the_dense_matrix_is_no_larger(m, n, form):
    rank = break_even_rank(m, n, form)
    assert 1 <= rank <= min(m, n)
    assert num_parameters(m, n, rank, form) >= m * n
    assert num_parameters(m, n, rank - 1, form) < m * n


def test_counts_are_those_of_the_stored_tensors():
    m, n, k = 7, 5, 3
    assert num_parameters(m, n, k, "plain") == m * k + k * n
    assert num_parameters(m, n, k, "pivoted") == k * n + (m - k) * k
    assert num_parameters(m, n, 5, "pivoted") == m * n
    assert num_parameters(m, n, 0, "plain") == 0


@given(m=SIZES, n=SIZES, parameters=st.integers(-5, 45000), form=st.sampled_from(FORMS))
def test_rank_for_parameters_is_the_largest_that_fits(m, n, parameters, form):
    rank = rank_for_parameters(m, n, parameters, form)
    assert rank == max((k for k in range(min(m, n) + 1) if num_parameters(m, n, k, form) <= parameters), default=0)


def test_rank_for_parameters_does_not_round_large_integers():
    # In floating point the square root is off by one here.
    m = n = 2**30
    for rank in (2**20 + 1, 2**30 - 2**14, 2**30 - 1):
        exact = num_parameters(m, n, rank, "pivoted")
        assert rank_for_parameters(m, n, exact, "pivoted") == rank
        assert rank_for_parameters(m, n, exact - 1, "pivoted") == rank - 1


@given(m=SIZES, n=SIZES, ratio=st.floats(0.001, 0.999), form=st.sampled_from(FORMS))
def test_rank_for_ratio_removes_at_least_that_much(m, n, ratio, form):
    rank = rank_for_ratio(m, n, ratio, form)
    assert num_parameters(m, n, rank, form) <= (1 - ratio) * m * n
    if rank < min(m, n):
        assert num_parameters(m, n, rank + 1, form) > (1 - ratio) * m * n - 1


def test_published_ranks():
    # SVD-LLM: int(m n keep / (m + n)); pivoting factorisation: k = 0.553 n for a square matrix at keep 0.8
    assert rank_for_ratio(4096, 11008, 0.2, "plain") == int(4096 * 11008 * 0.8 / (4096 + 11008))
    assert break_even_rank(4096, 11008, "plain") == 2986
    assert rank_for_ratio(10000, 10000, 0.2, "pivoted") == 5527


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_ratio_outside_the_unit_interval(ratio):
    with pytest.raises(ValueError, match="ratio is the fraction of parameters removed"):
        rank_for_ratio(4, 4, ratio)


@pytest.mark.parametrize("function", [num_parameters, rank_for_parameters])
def test_unknown_form(function):
    with pytest.raises(ValueError, match="form must be one of plain, pivoted"):
        function(4, 4, 2, "sparse")


@pytest.mark.parametrize("rank", [-1, 4])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match="outside 0 to 3"):
        num_parameters(5, 3, rank)


@given(s=st.lists(st.floats(0, 1e3).map(lambda x: round(x, 3)), min_size=1, max_size=20), energy=st.floats(0, 1))
def test_energy_rank_is_the_smallest_that_keeps_enough(s, energy):
    rank = energy_rank(s, energy)
    squares = np.sort(np.square(s))[::-1]
    kept = np.concatenate([[0], np.cumsum(squares)])
    rounding = 1e-12 * kept[-1]
    assert kept[rank] >= energy * kept[-1] - rounding
    assert rank == 0 or kept[rank - 1] < energy * kept[-1] + rounding


def test_energy_of_known_spectra():
    s = torch.tensor([1.0, 3.0, 2.0])  # any order
    assert [energy_rank(s, e) for e in (0, 0.5, 9 / 14, 0.7, 0.95, 1)] == [0, 1, 1, 2, 3, 3]
    assert energy_rank([2.0, 1.0, 0.0], 1.0) == 2
    assert energy_at(s, 1 / 3) == pytest.approx(9 / 14)
    assert energy_at(s, 0.5) == pytest.approx(13 / 14)
    assert (energy_at(s, 0), energy_at(s, 1)) == (0, 1)


def test_lists_are_read_in_float64():
    assert effective_rank([0.1, 0.2]) == pytest.approx(
        math.exp(-(1 / 3) * math.log(1 / 3) - (2 / 3) * math.log(2 / 3)), rel=1e-14
    )


def test_elbow():
    assert elbow_rank([10.0, 10, 10, 0, 0, 0, 0]) == 3
    assert elbow_rank([9.0] * 5 + [0.1 * 0.9**i for i in range(50)]) == 5
    assert elbow_rank(torch.ones(6) / 3) == 6
    assert elbow_rank([5.0, 4, 3, 2, 1]) == 5
    assert elbow_rank([2.0]) == 1


def test_effective_and_stable_rank():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert stable_rank(torch.ones(7)) == pytest.approx(7)
    s = np.array([4.0, 2.0, 1.0])
    p = s / 7
    assert effective_rank(s.tolist()) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert stable_rank(s.tolist()) == pytest.approx(21 / 16)


@pytest.mark.parametrize("scale", [1e300, 1e-300])
def test_the_rules_do_not_depend_on_scale(scale):
    s = torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    for rule in (effective_rank, stable_rank, elbow_rank, lambda x: energy_at(x, 0.5), lambda x: energy_rank(x, 0.9)):
        assert rule(s * scale) == pytest.approx(rule(s), rel=1e-12)


@pytest.mark.parametrize("s", [torch.zeros(3), [], torch.zeros(0)])
def test_a_zero_matrix_has_rank_zero(s):
    assert (effective_rank(s), stable_rank(s), elbow_rank(s), energy_rank(s, 0.9), energy_at(s, 0.5)) == (0, 0, 0, 0, 1)


@pytest.mark.parametrize("rule", [effective_rank, stable_rank, elbow_rank, lambda s: energy_rank(s, 0.5)])
@pytest.mark.parametrize("s", [[1.0, float("nan")], [1.0, float("inf")], [1.0, -1.0], torch.ones(2, 2)])
def test_no_spectrum_is_an_error(s, rule):
    with pytest.raises(LinalgError, match="not a one-dimensional spectrum of finite values >= 0"):
        rule(s)


def test_shares_outside_the_unit_interval():
    with pytest.raises(ValueError, match="energy is a share"):
        energy_rank([1.0], 1.1)
    with pytest.raises(ValueError, match="fraction is a share"):
        energy_at([1.0], -0.1)
