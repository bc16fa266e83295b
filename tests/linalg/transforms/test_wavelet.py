from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg.transforms import Wavelet, inverse_wavelet, wavelet

MOMENTS = {"haar": 1, "db2": 2, "db3": 3, "db4": 4}
every_name = pytest.mark.parametrize("name", MOMENTS)


def filters(name):
    """h and g, read off the first row of each band of one level."""
    p, q = MOMENTS[name], Wavelet(name, 1).matrix(32, dtype=torch.float64).numpy()
    assert not q[0, 2 * p :].any()
    assert not q[16, 2 * p :].any()
    return q[0, : 2 * p], q[16, : 2 * p]


def test_filters_with_a_closed_form():
    r3, r10 = math.sqrt(3), math.sqrt(10)
    s = math.sqrt(5 + 2 * r10)
    haar = np.array([1, 1]) / math.sqrt(2)
    db2 = np.array([1 + r3, 3 + r3, 3 - r3, 1 - r3]) / (4 * math.sqrt(2))
    db3 = [1 + r10 + s, 5 + r10 + 3 * s, 10 - 2 * r10 + 2 * s, 10 - 2 * r10 - 2 * s, 5 + r10 - 3 * s, 1 + r10 - s]
    for name, truth in {"haar": haar, "db2": db2, "db3": np.array(db3) / (16 * math.sqrt(2))}.items():
        assert np.allclose(filters(name)[0], truth, rtol=0, atol=4e-16)


@every_name
def test_filters_satisfy_the_equations_that_define_them(name):
    p, (h, g) = MOMENTS[name], filters(name)
    j = np.arange(2 * p)
    assert np.allclose(g, (-1.0) ** j * h[::-1], rtol=0, atol=4e-16)
    for shift in range(p):  # orthonormal to its own even shifts
        assert h[2 * shift :] @ h[: 2 * p - 2 * shift] == pytest.approx(float(shift == 0), abs=1e-15)
    assert h.sum() == pytest.approx(math.sqrt(2), abs=1e-15)
    for moment in range(p):  # of the details; the terms reach 7^3
        assert g @ j**moment == pytest.approx(0, abs=1e-13)
    # Of the solutions Daubechies' has all its zeros, but the p at -1, on one side of the unit circle.
    rest, remainder = np.polydiv(h, np.poly([-1.0] * p))
    assert np.allclose(remainder, 0, atol=1e-14)
    assert (np.abs(np.roots(rest)) < 1).all()


def test_haar_of_small_vectors():
    r2 = math.sqrt(2)
    x = torch.tensor([4.0, 2.0, 5.0, 5.0, 1.0, 3.0, 0.0, 8.0], dtype=torch.float64)
    expected = [28 / math.sqrt(8), 4 / math.sqrt(8), -2.0, -2.0, r2, 0.0, -r2, -8 / r2]
    assert torch.allclose(wavelet(x), torch.tensor(expected, dtype=torch.float64), atol=1e-15)
    assert torch.allclose(wavelet(x[:2]), torch.tensor([6 / r2, r2], dtype=torch.float64))
    assert torch.equal(wavelet(x[:1]), x[:1])


def test_an_odd_length_passes_its_last_entry_on():
    r2 = math.sqrt(2)
    x = torch.tensor([4.0, 2.0, 5.0, 5.0, 7.0], dtype=torch.float64)
    one = torch.tensor([6 / r2, 10 / r2, 7.0, r2, 0.0], dtype=torch.float64)
    two = torch.tensor([8.0, 7.0, -2.0, r2, 0.0], dtype=torch.float64)
    three = torch.tensor([15 / r2, 1 / r2, -2.0, r2, 0.0], dtype=torch.float64)
    for levels, expected in {1: one, 2: two, 3: three, None: three}.items():
        assert torch.allclose(wavelet(x, levels=levels), expected, atol=1e-14)
    assert torch.equal(wavelet(x, levels=0), x)


@every_name
def test_levels_repeat_the_first(name):
    x = torch.randn(3, 45, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    average, details = x, []
    for _ in range(3):
        average, detail = Wavelet(name, 1).bands(wavelet(average, name, levels=1))
        details.insert(0, detail)
    assert torch.equal(wavelet(x, name, levels=3), torch.cat((average, *details), dim=-1))


@every_name
def test_one_level_is_the_filter_at_every_other_place(name):
    x = np.random.default_rng(0).standard_normal(10)
    h, g = filters(name)
    windows = np.stack([np.roll(x, -2 * k)[np.arange(h.size) % 10] for k in range(5)])
    expected = np.concatenate((windows @ h, windows @ g))
    assert np.allclose(wavelet(torch.from_numpy(x), name, levels=1).numpy(), expected, rtol=0, atol=1e-14)


@every_name
def test_polynomials_have_no_details_inside(name):
    p, t = MOMENTS[name], torch.arange(64, dtype=torch.float64) / 64
    for degree in range(p + 1):
        _, detail = Wavelet(name, 1).bands(wavelet(t**degree, name, levels=1))
        inside = detail[: 32 - p + 1].abs().max()  # the last p - 1 windows wrap around
        assert inside < 1e-14 if degree < p else inside > 1e-8


def test_bands():
    transform = Wavelet("haar", 2)
    y = transform(torch.arange(20.0).reshape(2, 10))
    bands = transform.bands(y)
    assert [tuple(band.shape) for band in bands] == [(2, 3), (2, 2), (2, 5)]
    assert torch.equal(torch.cat(bands, dim=-1), y)
    bands[0].zero_()  # a view
    assert not y[:, :3].any()
    assert [band.shape[0] for band in transform.bands(y.mT.contiguous(), dim=0)] == [3, 2, 5]


def test_rows_constant_over_blocks_have_only_averages():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).repeat_interleave(8, dim=-1)
    average, *details = Wavelet("haar", 3).bands(wavelet(x, levels=3))
    assert torch.allclose(average, x[:, ::8] * math.sqrt(8), rtol=1e-6)
    assert all(detail.abs().max() <= 1e-6 for detail in details)


@pytest.mark.parametrize(
    ("n", "levels", "sizes"),
    [(1, None, (1,)), (2, None, (1, 1)), (3, None, (1, 1, 1)), (8, 0, (8,)), (1365, 2, (342, 341, 682))],
)
def test_sizes(n, levels, sizes):
    assert Wavelet("db2", levels).sizes(n) == sizes


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 200), name=st.sampled_from(list(MOMENTS)), data=st.data())
def test_sizes_and_reconstruction(n, name, data):
    most = len(Wavelet(name).sizes(n)) - 1
    assert most == (math.ceil(math.log2(n)) if n > 1 else 0)
    levels = data.draw(st.integers(0, most))
    sizes = Wavelet(name, levels).sizes(n)
    assert sum(sizes) == n
    assert sizes[0] == math.ceil(n / 2**levels)
    assert all(size == math.ceil(n / 2 ** (level - 1)) // 2 for level, size in enumerate(reversed(sizes[1:]), start=1))
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    y = wavelet(x, name, levels=levels)
    assert torch.allclose(inverse_wavelet(y, name, levels=levels), x, atol=1e-13)
    assert torch.allclose(y.norm(), x.norm(), rtol=1e-13)


def test_bad_options():
    with pytest.raises(ValueError, match="name must be one of haar, db2, db3, db4, not 'db9'"):
        Wavelet("db9")
    with pytest.raises(ValueError, match="levels must be at least 0, not -1; leave it out"):
        wavelet(torch.ones(4), levels=-1)
    with pytest.raises(ValueError, match="levels must be at most 3 for 5 entries, not 4"):
        wavelet(torch.ones(5), levels=4)
    with pytest.raises(ValueError, match="levels must be at most 0 for 1 entries"):
        Wavelet(levels=1).sizes(1)
