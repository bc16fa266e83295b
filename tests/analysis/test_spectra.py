from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import tiny_models
from eckart.analysis import spectra
from eckart.linalg import LinalgError, break_even_rank
from eckart.models import linears


def _model(*weights: torch.Tensor) -> nn.Module:
    """A model whose repeated blocks hold these weights."""
    layers = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight
        layers.append(nn.Sequential(layer))
    return nn.ModuleDict({"layers": nn.ModuleList(layers)})


def _with_spectrum(s: torch.Tensor, m: int, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(m * n)
    u, _ = torch.linalg.qr(torch.randn(m, len(s), dtype=torch.float64, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(n, len(s), dtype=torch.float64, generator=generator))
    return ((u * s) @ v.mT).to(dtype)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_a_known_spectrum(shape):
    s = 0.8 ** torch.arange(24, dtype=torch.float64)
    [found] = spectra(_model(_with_spectrum(s, *shape)), progress=False)
    total = s.square().sum()
    p = s / s.sum()
    assert found.name == "layers.0.0"
    assert found.shape == shape
    # float32 weights: singular values carry an error of about 1e-7 of the largest
    assert found.singular_values.double() == pytest.approx(s, abs=1e-6)
    assert found.stable_rank == pytest.approx(float(total), rel=1e-5)
    assert found.effective_rank == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-5)
    # 10, 25 and 50 % of 24 singular values, rounded up
    assert found.energy == pytest.approx([float(s[:k].square().sum() / total) for k in (3, 6, 12)], rel=1e-5)
    assert found.largest == pytest.approx(1, rel=1e-6)
    assert found.condition == pytest.approx(float(1 / s[-1]), rel=1e-3)
    assert found.break_even_rank == break_even_rank(*shape, "plain")


def test_extremes():
    rank_one = torch.outer(torch.arange(1.0, 7.0), torch.ones(4))
    zero = torch.zeros(6, 4)
    found = spectra(_model(torch.eye(5), rank_one, zero, torch.ones(1, 3), torch.eye(4) * 1e30), progress=False)
    identity, one, nothing, row, huge = found
    assert (identity.stable_rank, identity.effective_rank, identity.condition) == pytest.approx((5, 5, 1))
    assert (one.stable_rank, one.energy[2]) == pytest.approx((1, 1))
    assert one.effective_rank == pytest.approx(1, abs=1e-4)
    assert nothing.largest == 0
    assert nothing.condition == math.inf
    assert all(math.isfinite(value) for value in (nothing.stable_rank, nothing.effective_rank, *nothing.energy))
    assert row.stable_rank == pytest.approx(1)
    assert (huge.stable_rank, huge.largest) == pytest.approx((4, 1e30))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    weight = _with_spectrum(0.9 ** torch.arange(16, dtype=torch.float64), 16, 20, dtype)
    [found] = spectra(_model(weight), progress=False)
    exact = torch.linalg.svdvals(weight.double())  # of the weight as it is stored
    assert found.singular_values.double() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_in_the_order_of_the_model(family):
    model = tiny_models.FAMILIES[family]()
    found = spectra(model, progress=False)
    refs = linears(model).linears
    assert [layer.name for layer in found] == [ref.name for ref in refs]
    for ref, layer in zip(refs, found, strict=True):
        exact = torch.linalg.svdvals(ref.weight.detach().double())
        assert layer.shape == ref.shape
        assert layer.singular_values.double() == pytest.approx(exact, rel=1e-4, abs=1e-5 * float(exact[0]))


def test_structures_are_seen_as_a_whole_and_only_what_is_selected():
    model = tiny_models.FAMILIES["llama"]()
    tiny_models.low_rank(model, rank=3)
    found = spectra(model, where=["*.q_proj", "1.mlp.down_proj"], progress=False)
    assert [layer.name.rpartition(".")[2] for layer in found] == ["q_proj", "q_proj", "down_proj"]
    assert all(float(layer.singular_values[3:].max()) < 1e-5 * layer.largest for layer in found)


def test_to_dict_is_plain_and_leaves_the_singular_values_out():
    [found] = spectra(_model(torch.eye(4)), progress=False)
    assert found.to_dict() == {
        "name": "layers.0.0",
        "shape": (4, 4),
        "stable_rank": pytest.approx(4),
        "effective_rank": pytest.approx(4),
        "energy": {"10%": pytest.approx(0.25), "25%": pytest.approx(0.25), "50%": pytest.approx(0.5)},
        "break_even_rank": 2,
        "largest": pytest.approx(1),
        "condition": pytest.approx(1),
    }


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_damaged_weight_is_named(value):
    weight = torch.eye(4)
    weight[1, 2] = value
    with pytest.raises(LinalgError, match=r"^layers\.1\.0: "):
        spectra(_model(torch.eye(4), weight), progress=False)


def test_a_model_without_linears_is_refused():
    with pytest.raises(ValueError, match="has no linear layers"):
        spectra(nn.Sequential(nn.Conv2d(1, 1, 1)), progress=False)
