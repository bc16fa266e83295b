from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import tiny_models
from eckart.models import linears
from eckart.models.parts import AttentionPart, MLPPart, parts
from model_state import assert_unchanged, snapshot


def found_in(model, where=None):
    return parts(model, linears(model, where).linears)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_selected_linear_is_in_one_part_or_left_with_a_reason(family):
    model = tiny_models.FAMILIES[family]()
    names = [ref.name for ref in linears(model).linears]
    before = snapshot(model)
    found, left = found_in(model)
    assert sorted([*(ref.name for part in found for ref in part.linears), *(s.name for s in left)]) == sorted(names)
    assert all("is no part of" in entry.reason and entry.parameters > 0 for entry in left)
    assert_unchanged(model, before)


def test_the_parts_of_a_llama_in_their_order():
    found, left = found_in(tiny_models.FAMILIES["llama"]())
    assert left == []
    assert [part.name for part in found] == [
        "model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.self_attn", "model.layers.1.mlp",
    ]  # fmt: skip
    attention, mlp = found[:2]
    assert isinstance(attention, AttentionPart)
    assert isinstance(mlp, MLPPart)
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.rotary) == (4, 2, 8, True)
    assert [ref.name.rpartition(".")[2] for ref in attention.linears] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert ([ref.name.rpartition(".")[2] for ref in mlp.inputs], mlp.output.name, mlp.width) == (
        ["gate_proj", "up_proj"], "model.layers.0.mlp.down_proj", 48,
    )  # fmt: skip


def test_linears_that_stand_in_the_block_itself():
    found, _ = found_in(tiny_models.FAMILIES["opt"]())
    mlp = found[1]
    assert (mlp.name, [ref.name.rpartition(".")[2] for ref in mlp.linears]) == (
        "model.decoder.layers.0",
        ["fc1", "fc2"],
    )


@pytest.mark.parametrize(("family", "ends"), [("gpt2", ("c_attn", "c_proj")), ("phi3", ("qkv_proj", "o_proj"))])
def test_fused_attention_is_left(family, ends):
    found, left = found_in(tiny_models.FAMILIES[family]())
    assert not any(isinstance(part, AttentionPart) for part in found)
    assert {entry.name.rpartition(".")[2] for entry in left if "attn" in entry.name} == set(ends)


def test_a_part_is_found_only_if_all_its_linears_are_selected():
    model = tiny_models.FAMILIES["llama"]()
    found, left = found_in(model, ["*.[qkv]_proj", "*.1.mlp.*"])
    assert [part.name for part in found] == ["model.layers.1.mlp"]
    assert len(left) == 6


class Shuffled(nn.Module):
    """An MLP whose inner channels depend on their neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.down_proj = nn.Linear(48, 32, bias=False)

    def forward(self, x):
        return self.down_proj(self.gate_proj(x).roll(1, -1).relu() * self.up_proj(x))


def test_channels_that_look_at_others_are_left():
    model = tiny_models.FAMILIES["llama"]()
    model.model.layers[0].mlp = Shuffled()
    found, left = found_in(model)
    assert "model.layers.0.mlp" not in [part.name for part in found]
    assert {entry.name.rpartition(".")[0] for entry in left} == {"model.layers.0.mlp"}


def test_channels_that_are_normalised_are_left():
    """BitNet as it is built: a norm with equal weights does not show when channels are only exchanged."""
    model = transformers.BitNetForCausalLM(transformers.BitNetConfig(**tiny_models._TEXT)).eval()
    found, left = found_in(model)
    assert not any(isinstance(part, MLPPart) for part in found)
    assert {entry.name.rpartition(".")[2] for entry in left} == {"gate_proj", "up_proj", "down_proj"}


def test_half_precision_and_training_mode():
    model = tiny_models.FAMILIES["llama"]().to(torch.bfloat16).train()
    found, left = found_in(model)
    assert (len(found), left) == (4, [])
    assert all(module.training for module in model.modules())
