from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg.tensors.shapes import balanced_factors, kronecker_shape, kronecker_shapes


def test_shapes_of_a_small_matrix():
    # (2, 2) and (2, 3) have 4 + 6 parameters; (4, 1) and (1, 6) are ordinary low rank of 4 + 6
    shapes = kronecker_shapes(4, 6)
    assert set(shapes[:4]) == {(2, 2), (2, 3), (4, 1), (1, 6)}
    assert len(shapes) == 3 * 4 - 2
    assert not {(1, 1), (4, 6)} & set(shapes)


def test_prime_sizes_have_ordinary_low_rank_only():
    assert kronecker_shapes(7, 11) == [(7, 1), (1, 11)]
    assert kronecker_shape(7, 11) == (7, 1)
    assert kronecker_shapes(7, 1) == kronecker_shapes(1, 7) == kronecker_shapes(1, 1) == []
    with pytest.raises(ValueError, match="a 1 x 7 matrix is a Kronecker product only with a number"):
        kronecker_shape(1, 7)


@pytest.mark.parametrize(
    ("size", "shape"),
    [((4096, 4096), (64, 64)), ((1024, 4096), (32, 64)), ((4096, 1), (64, 1)), ((1, 6), (1, 2)), ((64, 7), (16, 1))],
)
def test_balanced_shape(size, shape):
    assert kronecker_shape(*size) == shape


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 60), n=st.integers(1, 60))
def test_all_divisors_are_listed_cheapest_first(m, n):
    shapes = kronecker_shapes(m, n)
    everything = {(i, j) for i in range(1, m + 1) for j in range(1, n + 1) if m % i == 0 and n % j == 0}
    assert set(shapes) == everything - {(1, 1), (m, n)}
    assert len(shapes) == len(set(shapes))
    costs = [i * j + m * n // (i * j) for i, j in shapes]
    assert costs == sorted(costs)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 5000), sites=st.integers(1, 6))
def test_balanced_factors_multiply_to_the_size(size, sites):
    factors = balanced_factors(size, sites)
    assert len(factors) == sites
    assert math.prod(factors) == size
    assert list(factors) == sorted(factors, reverse=True)


def test_balanced_factors_are_balanced():
    assert balanced_factors(4096, 4) == (8, 8, 8, 8)
    assert balanced_factors(576, 2) == (24, 24)
    assert balanced_factors(13, 3) == (13, 1, 1)
    for size, sites in ((0, 2), (4, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            balanced_factors(size, sites)
