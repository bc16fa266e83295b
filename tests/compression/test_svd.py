from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny_models
from eckart.compression import compress
from eckart.compression.svd import SVD
from eckart.models import Statistics, linears

SHAPES = [(12, 20), (20, 12), (15, 15), (1, 6), (6, 1)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truncated(weight: torch.Tensor, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_rank_is_the_truncated_svd(shape):
    weight = normal(*shape)
    s = np.linalg.svd(weight.numpy(), compute_uv=False)
    np.testing.assert_allclose(SVD().spectrum(weight, Statistics()), s, rtol=1e-9)
    for rank in range(1, min(shape) + 1):
        factors = SVD().factorize(weight, Statistics(), rank)
        assert (factors.up.shape, factors.down.shape) == ((shape[0], rank), (rank, shape[1]))
        b = (factors.up @ factors.down).numpy()
        np.testing.assert_allclose(b, truncated(weight, rank), atol=1e-10)
        assert np.linalg.norm(weight.numpy() - b) == pytest.approx(np.linalg.norm(s[rank:]), rel=1e-9, abs=1e-12)


def test_known_spectrum():
    """Diagonal in a rotated basis, with the singular values 10, 5, 2 and 1e-6."""
    u, v = (torch.linalg.qr(normal(9, 4, seed=seed)).Q for seed in (1, 2))
    weight = u @ torch.diag(torch.tensor([10.0, 5.0, 2.0, 1e-6]).double()) @ v.T
    factors = SVD().factorize(weight.float(), Statistics(), 3)
    b = factors.up.double() @ factors.down.double()
    # float32 entries of order 10 and the singular value left out.
    assert float((weight - b).norm()) < 1e-5
    two = SVD().factorize(weight.float(), Statistics(), 3).truncate(2)
    assert float((weight - two.up.double() @ two.down.double()).norm()) == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_half_precision_weights_are_worked_on_in_float32(dtype, scale):
    weight = (normal(24, 18) * scale).to(dtype)
    factors = SVD().factorize(weight, Statistics(), 7)
    assert factors.up.dtype == factors.down.dtype == torch.float32
    b = factors.up.double() @ factors.down.double()
    np.testing.assert_allclose(b, truncated(weight, 7), atol=2e-6 * scale * 8)


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_a_model_gets_the_truncated_svd_of_every_weight_without_data(family):
    model = tiny_models.FAMILIES[family]().double()
    weights = {ref.name: ref.weight.detach().clone() for ref in linears(model).linears}
    result = compress(model, "svd", rank=5, progress=False)
    assert result.error_of == "weight"
    assert {layer.name for layer in result.layers} == weights.keys()
    for layer in result.layers:
        best = truncated(weights[layer.name], 5)
        np.testing.assert_allclose(model.get_submodule(layer.name).dense().detach(), best, atol=1e-9)
        lost = np.linalg.norm(weights[layer.name].numpy() - best) / float(weights[layer.name].norm())
        # Errors are worked out in float32.
        assert layer.error == pytest.approx(lost, rel=1e-4)
