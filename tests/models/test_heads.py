"""Heads are found by what attention reads and how wide it says they are, in every family."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny_models
from eckart.models.heads import head_axes

ROLES = {
    "query": ("q_proj", "query", "q"), "key": ("k_proj", "key", "k"), "value": ("v_proj", "value", "v"),
    "output": ("o_proj", "out_proj", "o"),
}  # fmt: skip
FUSED = {"gpt2": ("c_proj", 0), "phi3": ("o_proj", 1), "gpt_neox": ("dense", 1)}  # Conv1D stores the transpose


@pytest.mark.parametrize("family", [name for name in tiny_models.FAMILIES if name not in FUSED])
def test_layers_of_their_own(family):
    model = tiny_models.FAMILIES[family]()
    found = head_axes(model)
    expected = {
        name: role
        for name, module in model.named_modules()
        for role, ends in ROLES.items()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ends
    }
    assert {one.name: one.role for one in found} == expected
    assert len(found) == len(expected) > 0
    for one in found:
        assert one.axis == (one.role == "output")
        assert one.head_dim == 8
        assert model.get_submodule(one.name).weight.shape[one.axis] % 8 == 0


@pytest.mark.parametrize("family", FUSED)
def test_fused_projections_are_left_out(family):
    end, axis = FUSED[family]
    found = head_axes(tiny_models.FAMILIES[family]())
    assert [(one.name.rpartition(".")[2], one.role, one.axis, one.head_dim) for one in found] == [
        (end, "output", axis, 8)
    ] * tiny_models.LAYERS


def test_heads_are_what_attention_sees():
    """The rows of a head of values, set to zero, blank the columns of the output projection that read this head."""
    model = tiny_models.FAMILIES["llama"]()
    layer = model.model.layers[0].self_attn
    value = next(one for one in head_axes(model) if one.name.endswith("0.self_attn.v_proj"))
    seen = []
    layer.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        layer.v_proj.weight[value.head_dim : 2 * value.head_dim] = 0
        model(input_ids=torch.arange(6)[None])
    blank = (seen[0] == 0).all(dim=1)[0].reshape(-1, value.head_dim).all(dim=1)
    assert blank.tolist() == [False, False, True, True]  # two heads of queries read each head of values
