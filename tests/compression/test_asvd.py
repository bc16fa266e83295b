from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny_models
from eckart.compression import compress
from eckart.compression.asvd import ASVD
from eckart.compression.svd import SVD
from eckart.models import Statistics, linears
from model_state import inputs_by_hooks


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scaled_svd(weight: np.ndarray, scale: np.ndarray, rank: int) -> np.ndarray:
    """(W D)_k D^-1, as the paper writes it."""
    u, s, vh = np.linalg.svd(weight * scale, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank] / scale


def product(method, weight, statistics, rank):
    factors = method.factorize(weight, statistics, rank)
    return (factors.up @ factors.down).numpy()


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(10, 14), (14, 10)], ids=str)
def test_every_rank_is_the_svd_of_the_scaled_weight(shape, alpha):
    weight, size = normal(*shape), normal(shape[1], seed=1).abs() + 0.1
    scale = size.numpy() ** alpha
    for rank in (1, 4, min(shape)):
        found = product(ASVD(alpha), weight, Statistics(absmean=size), rank)
        np.testing.assert_allclose(found, scaled_svd(weight.numpy(), scale, rank), atol=1e-8)
        error = np.linalg.norm((weight.numpy() - found) * scale)
        tail = np.linalg.svd(weight.numpy() * scale, compute_uv=False)[rank:]
        assert error == pytest.approx(np.linalg.norm(tail), rel=1e-8, abs=1e-8)


def test_alpha_zero_and_equal_inputs_are_the_plain_svd():
    weight = normal(10, 14)
    plain = product(SVD(), weight, Statistics(), 5)
    np.testing.assert_allclose(product(ASVD(0.0), weight, Statistics(absmean=normal(14).abs()), 5), plain, atol=1e-9)
    same = Statistics(absmean=torch.full((14,), 3.0).double())
    np.testing.assert_allclose(product(ASVD(), weight, same, 5), plain, atol=1e-9)


def test_the_scale_of_the_activations_does_not_matter():
    weight, size = normal(10, 14), normal(14, seed=1).abs() + 0.1
    one, other = (product(ASVD(), weight, Statistics(absmean=size * c), 5) for c in (1, 1e-12))
    np.testing.assert_allclose(one, other, atol=1e-9)


def test_a_silent_input_counts_as_much_as_the_quietest_other():
    weight, size = normal(6, 5), torch.tensor([4.0, 0.0, 1.0, 0.25, 0.0]).double()
    scale = np.array([2.0, 0.5, 1.0, 0.5, 0.5])
    found = product(ASVD(), weight, Statistics(absmean=size), 3)
    np.testing.assert_allclose(found, scaled_svd(weight.numpy(), scale, 3), atol=1e-9)
    silent = product(ASVD(), weight, Statistics(absmean=torch.zeros(5).double()), 3)
    np.testing.assert_allclose(silent, product(SVD(), weight, Statistics(), 3), atol=1e-12)


@pytest.mark.parametrize("alpha", [-0.1, 2.1, float("nan")])
def test_alpha_is_checked(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 2\], not .*; the paper uses 0.5"):
        ASVD(alpha)


def test_a_model_is_scaled_by_the_inputs_it_sees():
    model = tiny_models.FAMILIES["llama"]().double()
    data = [tiny_models.inputs(model, 4, 16)]
    weights = {ref.name: ref.weight.detach().clone() for ref in linears(model).linears}
    seen = inputs_by_hooks(model, weights, data)
    truth = {name: x.abs().mean(0).sqrt().numpy() for name, x in seen.items()}
    compress(model, "asvd", rank=6, data=data, progress=False)
    for name, weight in weights.items():
        found = model.get_submodule(name).dense().detach().numpy()
        np.testing.assert_allclose(found, scaled_svd(weight.numpy(), truth[name], 6), atol=1e-7)
