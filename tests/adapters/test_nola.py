"""NOLA: the mixtures against explicit matrices, their gradient, and files that know nothing of rank or width."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

import tiny_models
from eckart.adapters import EckartConfig
from eckart.adapters import nola as module
from eckart.adapters.nola import NOLA, RandomBasis
from eckart.adapters.site import Site


def explicit(basis: RandomBasis) -> np.ndarray:
    """The matrices, each from a mixture that takes it alone."""
    eye = torch.eye(basis.count)
    return torch.stack([basis.mix(row) for row in eye]).double().numpy()


def test_the_matrices_are_uniform_of_the_stated_size_and_repeat_themselves():
    basis = RandomBasis(3, 400, 4, 5)
    matrices = explicit(basis)
    assert np.abs(matrices).max() <= 400**-0.5
    # Variance of a uniform number in ±a is a²/3; 8000 numbers give it to 2 %.
    assert abs(matrices.var() * 400 * 3 - 1) < 0.05
    assert (explicit(RandomBasis(3, 400, 4, 5, keep=False)) == matrices).all()
    assert not (explicit(RandomBasis(4, 400, 4, 5)) == matrices).any()


def test_drawing_in_parts_changes_nothing(monkeypatch):
    weights = torch.randn(50, generator=torch.Generator().manual_seed(0))
    whole = RandomBasis(0, 50, 6, 7).mix(weights)
    monkeypatch.setattr(module, "_AT_ONCE", 3 * 42)
    for keep in (True, False):
        basis = RandomBasis(0, 50, 6, 7, keep=keep)
        for _ in range(2):
            assert torch.allclose(basis.mix(weights), whole, atol=1e-6)
        assert bool(basis._kept) is keep


@pytest.mark.parametrize("keep", [True, False])
def test_the_gradient(keep):
    basis = RandomBasis(0, 5, 3, 4, keep=keep)
    weights = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(basis.mix, (weights,))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    adapter = NOLA(terms=6).build(Site("layer", "linear", 12, 10), 3, 1.0)
    adapter.initialize(torch.zeros(12, 10), None, torch.Generator())
    adapter(torch.ones(2, 10), nn.Linear(10, 12, bias=False).requires_grad_(False)).sum().backward()
    after_layer = torch.get_rng_state()
    torch.manual_seed(0)
    nn.Linear(10, 12, bias=False)
    assert torch.equal(torch.get_rng_state(), after_layer)
    assert not torch.equal(before, after_layer)


def test_the_update_against_numpy():
    adapter = NOLA(terms=6).build(Site("layer", "linear", 12, 10), 3, 0.5)
    adapter.initialize(torch.zeros(12, 10), None, torch.Generator())
    generator = torch.Generator().manual_seed(0)
    start = adapter.low_rank()[1].detach().double().numpy()  # A_0
    assert np.abs(start).max() <= 10**-0.5
    adapter.left_weights.data = torch.randn(6, generator=generator)
    adapter.right_weights.data = torch.randn(6, generator=generator)
    beta, alpha = adapter.left_weights.detach().double().numpy(), adapter.right_weights.detach().double().numpy()
    b = np.tensordot(beta, explicit(adapter.left_basis), 1)
    a = start + np.tensordot(alpha, explicit(adapter.right_basis), 1)
    assert np.abs(adapter.delta(torch.zeros(1)).detach().numpy() - 0.5 * b @ a).max() < 1e-6
    x = torch.randn(4, 10, generator=generator)
    base = nn.Linear(10, 12)
    expected = base(x) + x @ torch.tensor(0.5 * b @ a, dtype=torch.float32).T
    assert torch.allclose(adapter(x, base), expected, atol=1e-5)


def test_the_second_factor_moves_first():
    adapter = NOLA(terms=6).build(Site("layer", "linear", 12, 10), 3, 1.0)
    adapter.initialize(torch.zeros(12, 10), None, torch.Generator())
    base = nn.Linear(10, 12)
    x = torch.randn(4, 10)
    assert torch.equal(adapter(x, base), base(x))
    adapter(x, base).square().sum().backward()
    assert bool((adapter.left_weights.grad != 0).all())
    assert bool((adapter.right_weights.grad == 0).all())


def test_files_are_as_large_at_every_rank_and_layers_share_their_matrices(tmp_path):
    sizes = []
    for rank in (1, 4, 16):
        config = EckartConfig(method="nola", r=rank, options={"terms": 8})
        model = get_peft_model(tiny_models.FAMILIES["llama"](), config)
        model.save_pretrained(tmp_path / str(rank))
        sizes.append((tmp_path / str(rank) / "adapter_model.safetensors").stat().st_size)
        adapters = [m for m in model.modules() if isinstance(m, module._NOLAAdapter)]
        shapes = {(a.site.out_features, a.site.in_features) for a in adapters}
        assert len({id(a.left_basis) for a in adapters}) == len(shapes) < len(adapters)
        assert model.get_nb_trainable_parameters()[0] == len(adapters) * 16
    assert len(set(sizes)) == 1


def test_wrong_options():
    with pytest.raises(ValueError, match="terms must be at least 1"):
        NOLA(terms=0)
    with pytest.raises(ValueError, match="basis_seed must be at least 0"):
        NOLA(basis_seed=-1)
