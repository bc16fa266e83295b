from __future__ import annotations

import pytest
import torch

from eckart.linalg import accumulate_cross_gram, accumulate_gram, symmetrize

# One below, at and above the width from which only the upper triangle is multiplied, odd ones, and several levels.
WIDTHS = [1, 7, 256, 257, 301, 511, 700, 1031]


def rows(count: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_sum_over_batches_is_the_product_of_all_rows(width):
    batches = [rows(count, width, seed) for seed, count in enumerate((5, 0, 1, 64))]
    total = torch.zeros(width, width, dtype=torch.float64)
    for x in batches:
        accumulate_gram(total, x)
    everything = torch.cat(batches)
    assert symmetrize(total) is total
    torch.testing.assert_close(total, everything.T @ everything, rtol=0, atol=1e-12 * len(everything))
    assert torch.equal(total, total.T)


@pytest.mark.parametrize("width", [255, 300])
def test_float32_rows_are_summed_in_float64(width):
    """One large batch, then many small ones that a float32 sum would lose: 1e8 + 1 = 1e8 there."""
    total = torch.zeros(width, width, dtype=torch.float64)
    accumulate_gram(total, torch.full((1, width), 1e4, dtype=torch.float32))
    for _ in range(50):
        accumulate_gram(total, torch.ones(1, width, dtype=torch.float32))
    assert torch.equal(symmetrize(total), torch.full((width, width), 1e8 + 50, dtype=torch.float64))


def test_symmetrize_reads_the_upper_triangle_only():
    upper = rows(600, 600).triu()
    total = symmetrize(upper + torch.full((600, 600), 7.0, dtype=torch.float64).tril(-1))
    assert torch.equal(total, upper + upper.triu(1).T)


@pytest.mark.parametrize(("left", "right"), [(3, 5), (300, 257)])
def test_cross_gram(left, right):
    y, x = [rows(count, left, count) for count in (4, 9)], [rows(count, right, 50 + count) for count in (4, 9)]
    total = torch.zeros(left, right, dtype=torch.float64)
    for one, other in zip(y, x, strict=True):
        accumulate_cross_gram(total, one, other)
    torch.testing.assert_close(total, torch.cat(y).T @ torch.cat(x), rtol=0, atol=1e-12)
