from __future__ import annotations

import json

import pytest
import torch

from eckart.structures.low_rank_embedding import LowRankEmbedding


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_of(padding_idx: int | None = None, rank: int = 3) -> tuple[LowRankEmbedding, torch.Tensor]:
    table, basis = random(20, 5), torch.linalg.qr(random(5, 5, seed=1)).Q[:, :rank]
    layer = LowRankEmbedding.from_table(table, basis, random(5, seed=2), padding_idx)
    wanted = random(5, seed=2) + (table - random(5, seed=2)) @ basis @ basis.T
    if padding_idx is not None:
        wanted[padding_idx] = table[padding_idx]
    return layer, wanted


@pytest.mark.parametrize("padding_idx", [None, 0, 7])
def test_look_ups_and_the_table_are_projections(padding_idx):
    layer, wanted = layer_of(padding_idx)
    ids = torch.tensor([[0, 7, 19], [7, 7, 3]])
    torch.testing.assert_close(layer(ids), wanted[ids], rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.dense(), wanted, rtol=0, atol=1e-12)
    assert layer.lookup(ids).shape == (2, 3, 3)


def test_full_rank_is_the_table():
    layer, _ = layer_of(rank=5)
    torch.testing.assert_close(layer.dense(), random(20, 5), rtol=0, atol=1e-12)


def test_counts_are_those_of_what_is_stored():
    layer, _ = layer_of(4)
    assert layer.num_parameters() == sum(p.numel() for p in layer.parameters()) == 20 * 3 + 5 * 3 + 5
    assert layer.nbytes() == 8 * (layer.num_parameters() + 5)


@pytest.mark.parametrize("padding_idx", [None, 4])
def test_spec_and_tensors_give_it_back(padding_idx):
    layer, wanted = layer_of(padding_idx)
    again = LowRankEmbedding.from_spec(json.loads(json.dumps(layer.spec())), dtype=torch.float64)
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again.dense(), wanted, rtol=0, atol=1e-12)
    assert again.spec() == layer.spec()
    assert "rank=3" in repr(layer)


def test_everything_but_the_padding_learns():
    layer, _ = layer_of(4)
    layer(torch.tensor([4, 5])).square().sum().backward()
    assert not layer.codes.grad[4].any()
    assert layer.codes.grad[5].any()
    assert layer.up.grad.any()
    assert layer.mean.grad.any()
    assert not layer.padding.requires_grad


def test_wrong_sizes_and_specs_are_refused():
    with pytest.raises(ValueError, match=r"the rank of a \(9, 4\) table must be from 1 to its width, not 5"):
        LowRankEmbedding(9, 4, 5)
    with pytest.raises(ValueError, match="padding_idx must be one of 9 ids, not 9"):
        LowRankEmbedding(9, 4, 2, padding_idx=9)
    with pytest.raises(ValueError, match="reads specs of type"):
        LowRankEmbedding.from_spec({"type": "dense"})
    with pytest.raises(ValueError, match="wrong entries"):
        LowRankEmbedding.from_spec({"type": "low_rank_embedding", "colour": "red"})
