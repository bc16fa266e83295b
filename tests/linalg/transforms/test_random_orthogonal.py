from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError
from eckart.linalg.transforms import RandomizedHadamard, RandomOrthogonal, random_orthogonal


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    columns=st.integers(1, 40),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 999),
)
def test_columns_are_orthonormal(n, columns, dtype, seed):
    k = min(n, columns)
    q = random_orthogonal(n, k, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    assert (q.shape, q.dtype) == ((n, k), dtype)
    # Rounded once from float64: an inner product of unit vectors is off by at most two roundings.
    assert torch.allclose(
        q.double().mT @ q.double(), torch.eye(k, dtype=torch.float64), rtol=0, atol=20 * torch.finfo(dtype).eps
    )


def test_uniform_on_the_circle_and_both_determinants():
    generator = torch.Generator().manual_seed(0)
    q = torch.stack([random_orthogonal(2, generator=generator, dtype=torch.float64) for _ in range(1000)]).numpy()
    angle = np.arctan2(q[:, 1, 0], q[:, 0, 0])
    assert scipy.stats.kstest(angle, "uniform", args=(-math.pi, 2 * math.pi)).pvalue > 0.01
    assert scipy.stats.binomtest(int((np.linalg.det(q) > 0).sum()), 1000).pvalue > 0.01


def test_first_entry_has_the_law_of_a_coordinate_on_the_sphere():
    generator = torch.Generator().manual_seed(1)
    entries = [float(random_orthogonal(5, generator=generator, dtype=torch.float64)[3, 4]) for _ in range(1000)]
    # The square of a coordinate on the unit sphere of R^5 follows Beta(1/2, 2).
    assert scipy.stats.kstest(np.square(entries), "beta", args=(0.5, 2)).pvalue > 0.01


def test_repeats_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    assert torch.equal(random_orthogonal(6), random_orthogonal(6))
    assert torch.equal(RandomizedHadamard.draw(6).signs, RandomizedHadamard.draw(6).signs)
    assert torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator().manual_seed(0)
    first, second = (random_orthogonal(6, generator=generator) for _ in range(2))
    assert torch.equal(first, random_orthogonal(6))
    assert not torch.equal(first, second)
    assert torch.equal(first, random_orthogonal(6, dtype=torch.float64).float())
    assert torch.equal(RandomOrthogonal.draw(6).q, first)


def test_randomized_hadamard_is_signs_then_hadamard():
    transform = RandomizedHadamard.draw(64)
    assert transform.signs.dtype == torch.int8
    assert transform.signs.unique().tolist() == [-1, 1]
    signs = transform.matrix(dtype=torch.float64) * 8
    assert torch.equal(signs[0], transform.signs.double())  # the first row of a Sylvester matrix is all ones


def test_randomized_hadamard_flattens_what_hadamard_piles_up():
    n, draws = 256, 200
    x = torch.full((n,), n**-0.5, dtype=torch.float64)  # the plain transform puts all of it into one entry
    generator = torch.Generator().manual_seed(0)
    largest = [float(RandomizedHadamard.draw(n, generator=generator)(x).abs().max()) for _ in range(draws)]
    bound = math.sqrt(2 * math.log(2 * n / 0.05) / n)
    assert sum(value > bound for value in largest) <= 0.05 * draws


@pytest.mark.parametrize(("n", "k"), [(3, 0), (3, 4), (0, None)])
def test_bad_columns(n, k):
    with pytest.raises(ValueError, match="k must be 1 to n"):
        random_orthogonal(n, k)


def test_not_square():
    with pytest.raises(LinalgError, match=r"is not one square matrix; make it by RandomOrthogonal\.draw"):
        RandomOrthogonal(random_orthogonal(3, 2))


def test_bad_length():
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        RandomizedHadamard.draw(0)
