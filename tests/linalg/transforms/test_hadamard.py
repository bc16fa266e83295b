from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg.transforms import Hadamard, hadamard, inverse_hadamard


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32, 64, 128, 256, 2048])
def test_powers_of_two_against_scipy(n):
    x = np.random.default_rng(0).standard_normal((3, n))
    truth = x @ scipy.linalg.hadamard(n) / np.sqrt(n)
    assert np.allclose(hadamard(torch.from_numpy(x)).numpy(), truth, rtol=0, atol=1e-13)
    assert torch.equal(inverse_hadamard(torch.from_numpy(x)), hadamard(torch.from_numpy(x)))


# 12, 20, 44, 108: q + 1 with q = 11, 19, 43, 107. 28, 36, 148: 2 (q + 1) with q = 13, 17, 73. The others: times 2^k.
@pytest.mark.parametrize("n", [12, 20, 24, 28, 36, 44, 56, 96, 108, 148, 160, 384, 576, 768])
def test_where_a_hadamard_matrix_is_at_hand_every_entry_has_one_modulus(n):
    signs = Hadamard().matrix(n, dtype=torch.float64) * n**0.5
    assert torch.allclose(signs.abs(), torch.ones(n, n, dtype=torch.float64), rtol=0, atol=1e-13)
    signs = signs.round()
    assert torch.equal(signs @ signs.mT, n * torch.eye(n, dtype=torch.float64))  # in integers, so exactly


@pytest.mark.parametrize(("powers", "m"), [(1, 3), (2, 1), (4, 13), (2, 15), (4, 131)])
def test_elsewhere_the_block_is_a_cosine_transform(powers, m):
    """13: neither 51 nor 25 is prime. 4 * 131: Paley's 524 would be a dense product above the largest block."""
    block = scipy.fft.dct(np.eye(m), axis=0, norm="ortho")
    expected = np.kron(scipy.linalg.hadamard(powers) / np.sqrt(powers), block)
    assert np.allclose(Hadamard().matrix(powers * m, dtype=torch.float64).numpy(), expected, rtol=0, atol=1e-14)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 600))
def test_a_spike_is_spread_evenly(n):
    spike = torch.zeros(n, dtype=torch.float64)
    spike[n // 3] = 1
    y = hadamard(spike)
    assert y.norm() == pytest.approx(1, abs=1e-13)
    assert y.abs().max() <= (2 / n) ** 0.5 + 1e-14
    assert torch.allclose(inverse_hadamard(y), spike, atol=1e-13)
