from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import (
    LinalgError,
    frobenius_norm,
    nuclear_norm,
    relative_error,
    schatten_norm,
    spectral_norm,
)
from eckart.linalg.norms import nuclear_norm_l12

NORMS = {
    "frobenius": (frobenius_norm, lambda s: np.sqrt((s**2).sum())),
    "spectral": (spectral_norm, lambda s: s.max(initial=0)),
    "nuclear": (nuclear_norm, lambda s: s.sum()),
    "schatten 1/2": (lambda a: schatten_norm(a, 0.5), lambda s: np.sqrt(s).sum() ** 2),
    "schatten 3": (lambda a: schatten_norm(a, 3), lambda s: np.cbrt((s**3).sum())),
    "schatten inf": (lambda a: schatten_norm(a, math.inf), lambda s: s.max(initial=0)),
}


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (300, 280)], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_known_spectrum(name, shape, dtype, scale, known):
    norm, formula = NORMS[name]
    s = np.linspace(2, 0.1, min(shape))
    result = norm((known(*shape, s) * scale).to(dtype))
    assert result.dtype == torch.float64
    assert float(result) == pytest.approx(formula(s) * scale, rel=1e-9 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_edge_inputs(name):
    norm, _ = NORMS[name]
    assert float(norm(torch.zeros(4, 3))) == 0
    assert float(norm(torch.tensor([[-2.0]]))) == pytest.approx(2, rel=1e-15)
    assert float(norm(torch.full((1, 4), 0.5, dtype=torch.bfloat16))) == pytest.approx(1, rel=1e-6)
    assert norm(torch.zeros(0, 3)) == 0
    assert torch.allclose(norm(torch.ones(2, 3, 1, 1)), torch.ones(2, 3, dtype=torch.float64))
    assert float(norm(torch.full((1, 4), 3e300, dtype=torch.float64))) == pytest.approx(6e300, rel=1e-12)
    batch = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)).mT
    assert norm(batch).tolist() == pytest.approx([float(norm(one)) for one in batch], rel=1e-12)
    with pytest.raises(LinalgError, match="contains NaN or Inf"):
        norm(torch.tensor([[float("nan")]]))


def test_frobenius_norm_of_a_large_matrix_is_summed_in_float64():
    # Summed one by one in float32, 2^24 ones plus one is still 2^24.
    a = torch.full((5000, 4000), 0.1)
    assert float(frobenius_norm(a)) == pytest.approx(float(a[0, 0].double()) * math.sqrt(2e7), rel=1e-13)


def test_relative_error():
    reference = torch.tensor([[3.0, 4.0]])
    assert float(relative_error(torch.tensor([[3.0, 4.5]]), reference)) == pytest.approx(0.1)
    assert float(relative_error(reference, reference)) == 0
    assert float(relative_error(torch.zeros(2, 2), torch.zeros(2, 2))) == 0
    assert float(relative_error(torch.ones(2, 2), torch.zeros(2, 2))) == math.inf
    assert float(relative_error(reference.double() * 1e300, -reference.double() * 1e300)) == pytest.approx(2)
    assert float(relative_error(reference * 1e-30, reference * 1e30)) == pytest.approx(1)
    assert float(relative_error(reference * 1e31, reference * 1e30)) == pytest.approx(9)
    batch = torch.stack([reference, reference * 2])
    assert relative_error(batch, batch[:1].expand(2, 1, 2)).tolist() == pytest.approx([0, 1])
    with pytest.raises(LinalgError, match="differs in shape"):
        relative_error(torch.ones(2, 2), torch.ones(2, 3))


def test_bad_order():
    with pytest.raises(ValueError, match="p must be above 0"):
        schatten_norm(torch.eye(2), 0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1.0, 1e30, 1e-30]),
    seed=st.integers(0, 99),
)
def test_sum_of_column_norms_is_between_the_nuclear_norm_and_its_bound(m, n, dtype, scale, seed):
    a = (normal(m, n, seed=seed) * scale).to(dtype)
    lengths = np.linalg.norm(a.double().numpy(), axis=0)
    bound, truncated = nuclear_norm_l12(a), nuclear_norm_l12(a, truncated=True)
    assert bound.dtype == torch.float64
    assert float(bound) == pytest.approx(lengths.sum(), rel=1e-6)
    assert float(truncated) == pytest.approx(np.sort(lengths)[::-1][:m].sum(), rel=1e-6)
    assert float(nuclear_norm(a)) <= float(bound) * (1 + 1e-6)
    assert float(bound) <= math.sqrt(n) * float(frobenius_norm(a)) * (1 + 1e-6)


def test_orthogonal_columns_make_the_bound_exact():
    a = torch.linalg.qr(normal(9, 5))[0] * torch.tensor([5.0, 1.0, 2.0, 0.0, 3.0])
    assert float(nuclear_norm_l12(a)) == pytest.approx(float(nuclear_norm(a)), rel=1e-13)


def test_the_traps_of_the_bound():
    """It sees the basis, and cut to min(m, n) columns it is no bound; the numbers are those of Gaussian rows."""
    a = normal(20, 768)
    a = a / a.norm(dim=1, keepdim=True)
    rotation = torch.linalg.qr(normal(768, 768, seed=1))[0]
    one = torch.zeros(20, 768, dtype=torch.float64)
    one[:, 0] = 1  # of rank one
    for norm in (nuclear_norm, frobenius_norm):
        assert float(norm(one @ rotation)) == pytest.approx(float(norm(one)), rel=1e-9)
    assert float(nuclear_norm_l12(one)) == pytest.approx(float(nuclear_norm(one)), rel=1e-12)
    assert float(nuclear_norm_l12(one @ rotation)) > 15 * float(nuclear_norm(one))
    permuted = a[torch.randperm(20, generator=torch.Generator().manual_seed(0))][:, torch.arange(767, -1, -1)]
    assert float(nuclear_norm_l12(permuted)) == pytest.approx(float(nuclear_norm_l12(a)), rel=1e-12)
    exact, bound, published = nuclear_norm(a), nuclear_norm_l12(a), nuclear_norm_l12(a, truncated=True)
    assert [float(x) for x in (published, exact, bound)] == pytest.approx([4.5, 19.4, 122], rel=0.05)
    tall = normal(500, 64)
    tall = tall / tall.norm(dim=1, keepdim=True)
    assert float(nuclear_norm_l12(tall)) == float(nuclear_norm_l12(tall, truncated=True))
    assert [float(nuclear_norm(tall)), float(nuclear_norm_l12(tall))] == pytest.approx([176.0, 178.8], rel=0.01)


@pytest.mark.parametrize("truncated", [False, True])
def test_edges_of_the_bound(truncated):
    assert float(nuclear_norm_l12(torch.zeros(3, 4), truncated=truncated)) == 0
    assert float(nuclear_norm_l12(torch.zeros(0, 4), truncated=truncated)) == 0
    batch = normal(2, 3, 4, 6)
    for i in range(2):
        for j in range(3):
            one = nuclear_norm_l12(batch[i, j], truncated=truncated)
            assert float(nuclear_norm_l12(batch, truncated=truncated)[i, j]) == pytest.approx(float(one), rel=1e-13)
    with pytest.raises(LinalgError, match="contains NaN or Inf"):
        nuclear_norm_l12(torch.tensor([[float("nan")]]), truncated=truncated)
