"""Singular values to a relative accuracy: each way through the Gram matrix, and LAPACK where none will do."""

from __future__ import annotations

import pytest
import torch

from eckart.linalg import singular_values, svd_values

SHAPES = [(300, 100), (100, 300), (130, 120), (2500, 70)]


def _with_spectrum(shape: tuple[int, int], s: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    u, v = (torch.randn(n, len(s), dtype=torch.float64, generator=generator) for n in shape)
    return (torch.linalg.qr(u).Q * s @ torch.linalg.qr(v).Q.mT).float()


def _spectrum(kind: str, size: int) -> torch.Tensor:
    if kind == "step":  # the worst case: all errors fall on values of one size
        return torch.cat([torch.ones(size // 2), torch.full((size - size // 2,), 4e-7)]).double()
    if kind == "well":
        return torch.linspace(5, 1, size, dtype=torch.float64)
    smallest = {"log": -5.0, "middle": -2.5}[kind]
    return torch.logspace(0, smallest, size, dtype=torch.float64)


def _error(a: torch.Tensor, **options: float) -> float:
    exact = torch.linalg.svdvals(a.double())
    return float(((singular_values(a, **options) - exact) / exact).abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["well", "middle", "log", "step"])
@pytest.mark.parametrize("rtol", [1e-4, 1e-7])
def test_every_value_is_as_exact_as_asked(shape, kind, rtol):
    a = _with_spectrum(shape, _spectrum(kind, min(shape)))
    assert _error(a, rtol=rtol) < rtol


def test_without_it_small_values_may_be_noise():
    a = _with_spectrum((130, 120), _spectrum("step", 120))
    assert _error(a) > 1e-4


def test_columns_of_very_different_length():
    a = _with_spectrum((400, 100), _spectrum("well", 100)) * torch.logspace(0, -3, 100)
    assert _error(a, rtol=1e-4) < 1e-4
    assert _error(a[torch.randperm(400, generator=torch.Generator().manual_seed(0))], rtol=1e-4) < 1e-4


@pytest.mark.parametrize(
    ("kind", "shape", "ways"),
    [
        ("well", (300, 100), [torch.float32]),
        ("well", (130, 120), [torch.float64]),
        ("log", (300, 100), [torch.float32, torch.float64]),
        ("step", (300, 100), [torch.float32, torch.float64, "exact"]),
    ],
)
def test_the_cheapest_way_that_will_do(monkeypatch, kind, shape, ways):
    taken: list[object] = []
    gram, exact = svd_values._gram, svd_values._exact
    monkeypatch.setattr(svd_values, "_gram", lambda rows, dtype: taken.append(dtype) or gram(rows, dtype))
    monkeypatch.setattr(svd_values, "_exact", lambda rows: taken.append("exact") or exact(rows))
    singular_values(_with_spectrum(shape, _spectrum(kind, min(shape))), rtol=1e-4)
    assert taken == ways


def test_the_error_of_a_product_in_float32_is_bounded():
    for seed in range(5):
        rows = torch.randn(2000, 150, generator=torch.Generator().manual_seed(seed))
        rows *= torch.logspace(0, -1, 150)
        total = svd_values._gram(rows, torch.float32)
        exact = rows.double().mT @ rows.double()
        bound = float(svd_values._mend(total, rows))
        error = (total - exact).triu()
        norm = float(torch.linalg.matrix_norm(error + error.triu(1).mT, 2))
        assert norm <= bound <= 10 * norm


def test_batches_zeros_and_half_precision():
    batch = torch.stack([_with_spectrum((200, 80), _spectrum(kind, 80)) for kind in ("well", "log")])
    exact = torch.linalg.svdvals(batch.double())
    assert float(((singular_values(batch, rtol=1e-4) - exact) / exact).abs().max()) < 1e-4
    assert singular_values(torch.zeros(200, 80), rtol=1e-4).tolist() == [0.0] * 80
    half = batch[0].bfloat16()
    assert _error(half, rtol=1e-4) < 1e-4
