"""MSPLoRA: what is shared by whom, the counts of the paper, and the sum of the levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eckart.adapters.msplora import MSPLoRA, _parts
from eckart.adapters.site import Site


def sites(layers: int, types=(("q_proj", 12, 12), ("v_proj", 8, 12))) -> dict[str, Site]:
    names = [(f"layers.{i}.attn.{name}", rows, columns) for i in range(layers) for name, rows, columns in types]
    return {name: Site(name, "linear", rows, columns) for name, rows, columns in names}


def linked(method: MSPLoRA, layers: int, rank: int = 8, scale: float = 0.5) -> dict:
    made = {name: method.build(site, rank, scale) for name, site in sites(layers).items()}
    method.link(made)
    for index, adapter in enumerate(made.values()):
        adapter.initialize(torch.zeros(1), None, torch.Generator().manual_seed(index))
    return made


@pytest.mark.parametrize(("count", "expected"), [(3, "012"), (6, "001122"), (7, "0011222"), (8, "00111222"), (2, "12")])
def test_parts_begin_where_they_should(count, expected):
    assert "".join(map(str, _parts(count, 3))) == expected
    bounds = [p * count // 3 for p in range(4)]
    assert [bounds[p] <= i < bounds[p + 1] for i, p in enumerate(_parts(count, 3))] == [True] * count


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_layers_share_what_the_pyramid_says(layers, levels):
    method = MSPLoRA(levels=levels)
    made = linked(method, layers)
    trained = sum(p.numel() for adapter in made.values() for p in adapter.parameters())
    assert trained == method.total_trainable(sites(layers), dict.fromkeys(made, 8))
    for kind in ("q_proj", "v_proj"):
        members = [adapter for name, adapter in made.items() if name.endswith(kind)]
        assert len({id(adapter.model_left) for adapter in members}) == 1
        if levels == 3:
            parts = [id(adapter.part_right) for adapter in members]
            wanted = _parts(layers, 3)
            assert [parts[i] == parts[j] for i in range(layers) for j in range(layers)] == [
                wanted[i] == wanted[j] for i in range(layers) for j in range(layers)
            ]
        if levels > 1:
            assert len({id(adapter.layer_left) for adapter in members}) == layers
    assert made["layers.0.attn.q_proj"].model_right is not made["layers.0.attn.v_proj"].model_right


def test_only_indices_are_ignored_in_names():
    gates = sites(3, (("w1", 12, 12), ("w3", 12, 12)))
    made = {name: MSPLoRA().build(site, 8, 1.0) for name, site in gates.items()}
    MSPLoRA().link(made)
    assert made["layers.0.attn.w1"].model_left is made["layers.2.attn.w1"].model_left
    assert made["layers.0.attn.w1"].model_left is not made["layers.0.attn.w3"].model_left
    trained = sum(p.numel() for adapter in made.values() for p in adapter.parameters())
    assert trained == MSPLoRA().total_trainable(gates, dict.fromkeys(gates, 8)) == 2 * 24 * (8 + 3 * 4 + 3 * 2)


def test_the_counts_of_the_paper():
    roberta = sites(12, (("query", 768, 768), ("value", 768, 768)))
    assert MSPLoRA().total_trainable(roberta, dict.fromkeys(roberta, 8)) == 135_168
    llama = sites(32, (("q_proj", 4096, 4096), ("v_proj", 4096, 4096)))
    assert MSPLoRA().total_trainable(llama, dict.fromkeys(llama, 64)) == 11_010_048


def test_every_layer_sums_all_its_levels():
    made = linked(MSPLoRA(), 6)
    generator = torch.Generator().manual_seed(9)
    for adapter in made.values():
        for parameter in adapter.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    deltas = {}
    for name, adapter in made.items():
        parts = [
            (4.0 / r) * getattr(adapter, f"{level}_left").double() @ getattr(adapter, f"{level}_right").double()
            for level, r in (("model", 8), ("part", 4), ("layer", 2))  # alpha = 0.5 * 8
        ]
        expected = sum(part.detach().numpy() for part in parts)
        deltas[name] = adapter.delta(torch.zeros(1)).detach().double().numpy()
        assert np.abs(deltas[name] - expected).max() < 1e-4
        x = torch.randn(3, 12, generator=generator)
        assert np.abs(adapter.update(x).detach().numpy() - x.numpy() @ expected.T).max() < 1e-3
    # Layers of one part differ by their own level only, of rank 2 each.
    same = deltas["layers.0.attn.q_proj"] - deltas["layers.1.attn.q_proj"]
    other = deltas["layers.0.attn.q_proj"] - deltas["layers.2.attn.q_proj"]
    assert np.linalg.matrix_rank(same, tol=1e-4) == 4
    assert np.linalg.matrix_rank(other, tol=1e-4) > 4


def test_the_gradient_of_what_is_shared_is_the_sum_over_layers():
    made = linked(MSPLoRA(), 3)
    members = [adapter for name, adapter in made.items() if name.endswith("q_proj")]
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    separate = []
    for adapter in members:
        (gradient,) = torch.autograd.grad(adapter.update(x).sum(), adapter.model_left)
        separate.append(gradient)
    (together,) = torch.autograd.grad(sum(adapter.update(x).sum() for adapter in members), members[0].model_left)
    assert torch.allclose(together, sum(separate), atol=1e-5)
    assert all(float(gradient.abs().max()) > 0 for gradient in separate)


def test_small_ranks_have_fewer_levels():
    assert MSPLoRA().ranks_of_levels(3) == {"model": 3, "part": 1}
    assert MSPLoRA().ranks_of_levels(1) == {"model": 1}
    assert MSPLoRA(levels=2).ranks_of_levels(8) == {"model": 8, "layer": 4}


def test_wrong_options():
    with pytest.raises(ValueError, match="levels must be 1, 2 or 3"):
        MSPLoRA(levels=4)
    with pytest.raises(ValueError, match="parts must be at least 1"):
        MSPLoRA(parts=0)
