from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from eckart.linalg import LinalgError, power_law_tail


def _pareto(count: int, exponent: float, start: float = 1.0, seed: int = 0) -> torch.Tensor:
    uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return start * (1 - uniform) ** (-1 / (exponent - 1))


def _twin(values: np.ndarray) -> tuple[float, float, float, int]:
    """The definition: a loop over every start of the tail."""
    x = np.sort(values[values > 0])
    best = (math.inf, math.nan, math.nan, 0)
    for i in range(len(x) - 1):
        tail = x[i:]
        if i and x[i] == x[i - 1]:
            continue
        alpha = 1 + len(tail) / np.log(tail / x[i]).sum()
        law = 1 - (tail / x[i]) ** (1 - alpha)
        distance = np.abs(law - np.arange(len(tail)) / len(tail)).max()
        if distance < best[0]:
            best = (distance, alpha, x[i], len(tail))
    return best[1], best[2], best[0], best[3]


@pytest.mark.parametrize("count", [2, 3, 10, 200, 700])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_definition(count, seed):
    values = _pareto(count, 2.5, seed=seed)
    assert power_law_tail(values) == pytest.approx(_twin(values.numpy()), rel=1e-9)
    noise = torch.linalg.svdvals(torch.randn(count + 20, count, generator=torch.Generator().manual_seed(seed))) ** 2
    assert power_law_tail(noise) == pytest.approx(_twin(noise.double().numpy()), rel=1e-6)


@pytest.mark.parametrize("exponent", [1.8, 2.5, 4.0])
def test_finds_the_exponent_that_values_were_drawn_with(exponent):
    found = power_law_tail(_pareto(4000, exponent))
    assert found.exponent == pytest.approx(exponent, rel=5 / found.points**0.5)  # the standard error is (α - 1) / √n
    assert found.distance < 1.5 / found.points**0.5


def test_finds_where_the_tail_begins():
    """A bulk below 1 that is no power law, and a tail above it that is one."""
    bulk = 0.2 + 0.8 * torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).sqrt()
    found = power_law_tail(torch.cat([bulk, _pareto(1000, 3.0)]))
    assert found.start == pytest.approx(1, rel=0.25)
    assert found.exponent == pytest.approx(3, rel=0.15)


def test_scale_order_and_zeros_do_not_matter():
    values = _pareto(300, 2.2)
    found = power_law_tail(values)
    for changed, scale in ((values.flip(0), 1), (values * 1e-30, 1e-30), (torch.cat([values, torch.zeros(9)]), 1)):
        again = power_law_tail(changed)
        assert again == pytest.approx((found.exponent, found.start * scale, found.distance, found.points), rel=1e-9)


def test_equal_values_belong_to_one_tail():
    values = [1.0, 1.0, 1.0, 2.0, 2.0, 5.0, 9.0]
    assert power_law_tail(values) == pytest.approx(_twin(np.array(values)), rel=1e-9)
    for flat in ([], [3.0], [2.0, 2.0, 2.0], [0.0, 0.0, 4.0]):
        assert power_law_tail(flat) is None


def test_a_large_sample_goes_in_parts():
    values = _pareto(1500, 2.0, seed=4)
    assert power_law_tail(values) == pytest.approx(_twin(values.numpy()), rel=1e-9)


@pytest.mark.parametrize("bad", [[1.0, math.nan], [1.0, -2.0], [1.0, math.inf], [[1.0, 2.0]]])
def test_bad_values(bad):
    with pytest.raises(LinalgError, match="values"):
        power_law_tail(bad)
