from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny_models
from eckart.compression import compress
from eckart.compression.fwsvd import FWSVD
from eckart.compression.svd import SVD
from eckart.models import Statistics, linears

# So small that the floor under f does not show at the tolerances below.
EXACT = FWSVD(epsilon=1e-14)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(method, weight, f, rank):
    factors = method.factorize(weight, Statistics(fisher=f), rank)
    return (factors.up @ factors.down).numpy()


def paper(weight: np.ndarray, f: np.ndarray, rank: int) -> np.ndarray:
    """The paper's layout: rows are INPUT features, A = I^-1 U S, B = V^T; transposed back to (out, in)."""
    root = np.sqrt(f)[:, None]
    u, s, vh = np.linalg.svd(root * weight.T, full_matrices=False)
    return ((u[:, :rank] * s[:rank] / root) @ vh[:rank]).T


@pytest.mark.parametrize("shape", [(9, 13), (13, 9), (9, 9)], ids=str)
def test_the_columns_of_a_torch_weight_are_weighted(shape):
    """Square too, where a wrong orientation would raise no error."""
    weight, f = normal(*shape), normal(shape[1], seed=1).square() + 0.01
    for rank in (1, 4, min(shape)):
        found = product(EXACT, weight, f, rank)
        np.testing.assert_allclose(found, paper(weight.numpy(), f.numpy(), rank), atol=1e-7)
        tail = np.linalg.svd(weight.numpy() * np.sqrt(f.numpy()), compute_uv=False)[rank:]
        error = np.linalg.norm((weight.numpy() - found) * np.sqrt(f.numpy()))
        assert error == pytest.approx(np.linalg.norm(tail), rel=1e-7, abs=1e-7)


def test_a_weight_that_only_one_output_needs_is_not_what_is_weighted():
    """Two inputs, one of which the task uses: rank one must keep that COLUMN."""
    weight = torch.tensor([[3.0, 1.0], [4.0, 1.0]]).double()
    found = product(EXACT, weight, torch.tensor([0.0, 1.0]).double(), 1)
    np.testing.assert_allclose(found[:, 1], [1, 1], atol=1e-6)


def test_uniform_information_is_the_plain_svd():
    weight = normal(9, 13)
    plain = SVD().factorize(weight, Statistics(), 4)
    found = product(FWSVD(), weight, torch.full((13,), 7.0).double(), 4)
    np.testing.assert_allclose(found, plain.up @ plain.down, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e30])
def test_the_scale_of_the_information_does_not_matter(scale):
    weight, f = normal(9, 13), normal(13, seed=1).square()
    np.testing.assert_allclose(product(FWSVD(), weight, f * scale, 4), product(FWSVD(), weight, f, 4), atol=1e-9)


def test_the_plain_error_is_above_that_of_the_svd():
    weight, f = normal(9, 13), normal(13, seed=1).square()
    for rank in range(1, 9):
        plain = float(torch.linalg.svdvals(weight)[rank:].norm())
        assert np.linalg.norm(weight.numpy() - product(FWSVD(), weight, f, rank)) > plain * 1.001


@pytest.mark.parametrize("dead", [1, 6, 12])
def test_inputs_without_information_cost_nothing_and_are_not_lost(dead):
    """f of rank 13 - dead: what is left of the rank goes to the dead inputs' columns, and full rank is exact."""
    weight, f = normal(15, 13), normal(13, seed=1).square() + 0.1
    f[:dead] = 0
    alive = 13 - dead
    found = product(FWSVD(), weight, f, alive)
    # The floor of 1e-6 of the mean lets the dead columns draw a thousandth of the subspace.
    np.testing.assert_allclose(found[:, dead:], weight[:, dead:], atol=0.02)
    np.testing.assert_allclose(product(FWSVD(), weight, f, 13), weight, atol=1e-8)
    assert np.isfinite(product(FWSVD(epsilon=1e-300), weight, f, alive)).all()
    if alive < 12:
        more = product(FWSVD(), weight, f, alive + 1)
        dense = weight.numpy()[:, :dead]
        assert np.linalg.norm(dense - more[:, :dead]) < np.linalg.norm(dense - found[:, :dead])


def test_no_information_at_all_is_the_plain_svd():
    weight = normal(9, 13)
    plain = SVD().factorize(weight, Statistics(), 4)
    found = product(FWSVD(), weight, torch.zeros(13).double(), 4)
    np.testing.assert_allclose(found, plain.up @ plain.down, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("inf"), float("nan")])
def test_epsilon_is_checked(epsilon):
    with pytest.raises(ValueError, match=r"epsilon must be a positive number, not .*; the default is 1e-6"):
        FWSVD(epsilon)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_model_is_weighted_by_squared_gradients_of_single_sequences(family):
    """Conv1D stores its weight transposed, and OPT flattens its batches: both must come out as columns."""
    model = tiny_models.FAMILIES[family]().double()
    batch = tiny_models.inputs(model, 3, 8)
    refs = linears(model).linears
    weights = {ref.name: ref.weight.detach().clone().numpy() for ref in refs}
    truth = {ref.name: np.zeros(ref.in_features) for ref in refs}
    for i in range(3):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        gradients = torch.autograd.grad(model(**one, labels=one["input_ids"]).loss, [ref.module.weight for ref in refs])
        for ref, gradient in zip(refs, gradients, strict=True):
            truth[ref.name] += (gradient.mT if ref.kind == "conv1d" else gradient).square().sum(0).numpy()
    result = compress(model, EXACT, rank=6, data=[batch], progress=False)
    assert result.error_of == "weight"
    for name, weight in weights.items():
        found = model.get_submodule(name).dense().detach().numpy()
        # A neuron that no token woke up has no gradient; the paper's formula divides by it.
        alive = truth[name] > 0
        best = paper(weight[:, alive], truth[name][alive], 6)
        np.testing.assert_allclose(found[:, alive], best, atol=1e-5 * abs(weight).max())
    assert family != "opt" or not all((f > 0).all() for f in truth.values()), "no dead neuron was seen"
