"""Queries, keys and values are found by what attention reads, in every family."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, GPT2Config, GPT2Model

import tiny_models
from eckart.models.attention import Projection, attention_projections

NAMES = {"query": ("q_proj", "query", "q"), "key": ("k_proj", "key", "k"), "value": ("v_proj", "value", "v")}
FUSED = {
    "gpt2": ("c_attn", [(0, 32)], [(32, 64)], [(64, 96)]),
    "phi3": ("qkv_proj", [(0, 32)], [(32, 48)], [(48, 64)]),  # two heads of keys for four of queries
    # Head by head: 8 rows for queries, 8 for keys, 8 for values.
    "gpt_neox": ("query_key_value", *([(24 * h + s, 24 * h + s + 8) for h in range(4)] for s in (0, 8, 16))),
}


@pytest.mark.parametrize("family", [name for name in tiny_models.FAMILIES if name not in FUSED])
def test_layers_of_their_own(family):
    model = tiny_models.FAMILIES[family]()
    found = {one.name: one for one in attention_projections(model)}
    expected = {
        name: role
        for name, module in model.named_modules()
        for role, ends in NAMES.items()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ends
    }
    assert found.keys() == expected.keys() != set()
    for name, role in expected.items():
        rows = model.get_submodule(name).out_features
        assert found[name].out_features == rows
        for other in NAMES:
            assert getattr(found[name], other) == (((0, rows),) if other == role else ())
        assert not found[name].overlaps


@pytest.mark.parametrize("family", FUSED)
def test_rows_of_fused_layers(family):
    end, *parts = FUSED[family]
    found = attention_projections(tiny_models.FAMILIES[family]())
    assert [one.name.rpartition(".")[2] for one in found] == [end] * tiny_models.LAYERS
    for one in found:
        assert [one.query, one.key, one.value] == [tuple(part) for part in parts]
        assert not one.overlaps


def test_rows_serve_for_two_if_they_do():
    assert Projection("kv", 4, (), ((0, 3),), ((2, 4),)).overlaps
    with torch.device("meta"):
        meta = GPT2Model(GPT2Config(vocab_size=8, n_embd=8, n_layer=2, n_head=2))
    found = attention_projections(meta)
    assert len(found) == 2
    assert all(one.overlaps for one in found)  # without values the rows cannot be told apart


def test_the_model_and_the_random_numbers_stay_as_they_are():
    for family in ("gemma2", "vit"):
        model = tiny_models.FAMILIES[family]().train()
        model.requires_grad_(False)
        before = model.config._attn_implementation, dict(AttentionInterface()), torch.get_rng_state()
        attention_projections(model)
        after = model.config._attn_implementation, dict(AttentionInterface()), torch.get_rng_state()
        assert after[:2] == before[:2]
        assert torch.equal(after[2], before[2])
        assert all(module.training and not module._forward_hooks for module in model.modules())
        assert all(p.grad is None for p in model.parameters())


def test_all_is_put_back_after_an_error():
    model = tiny_models.FAMILIES["llama"]()
    before = model.config._attn_implementation, dict(AttentionInterface())
    with pytest.raises(TypeError):
        attention_projections(model, {"no_such_argument": torch.zeros(1), "input_ids": "text"})
    assert (model.config._attn_implementation, dict(AttentionInterface())) == before
    assert all(not module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="cannot make an example batch for Linear"):
        attention_projections(nn.Linear(2, 2))
