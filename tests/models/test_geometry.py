"""Shapes that a configuration does not tell: put on a module, written beside the structures, and read again."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import tiny_models
from eckart.models import EckartConfig, mark, replace
from eckart.models.geometry import Geometry, geometries, geometry_of, remove_geometry, set_geometry
from eckart.structures import Dense

KEPT = (0, 2, 4, 6)  # the pairs (0, 4) and (2, 6) of heads of width 8


def narrowed(layer: int = 0):
    """A Llama, one attention of which has the coordinates KEPT of every head only."""
    model = tiny_models.FAMILIES["llama"]()
    name = f"model.layers.{layer}.self_attn"
    attention = model.get_submodule(name)
    for key in ("q_proj", "k_proj", "v_proj"):
        weight = attention.get_submodule(key).weight.detach().unflatten(0, (-1, 8))[:, KEPT].flatten(0, 1)
        replace(model, f"{name}.{key}", Dense.from_weight(weight), resize=True)
    weight = attention.o_proj.weight.detach().unflatten(1, (-1, 8))[:, :, KEPT].flatten(1)
    replace(model, f"{name}.o_proj", Dense.from_weight(weight), resize=True)
    set_geometry(attention, Geometry({"head_dim": 4}, rotary=KEPT))
    return model


def zeroed(layer: int = 0):
    """The same map in a dense model: zeros instead of the other coordinates."""
    model = tiny_models.FAMILIES["llama"]()
    gone = [i for i in range(8) if i not in KEPT]
    attention = model.model.layers[layer].self_attn
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.unflatten(0, (-1, 8))[:, gone] = 0
    return model


def test_heads_of_fewer_coordinates_are_those_with_zeros_in_the_other_ones():
    torch.testing.assert_close(tiny_models.logits(narrowed()), tiny_models.logits(zeroed()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("by_place", [False, True])
def test_rotary_tables_are_found_by_keyword_and_by_place(by_place):
    attention = narrowed().model.layers[0].self_attn
    whole = zeroed().model.layers[0].self_attn
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    tables = tuple(torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(i)).repeat(1, 1, 2) for i in (1, 2))
    with torch.no_grad():
        if by_place:
            outputs = [module(x, tables, None)[0] for module in (attention, whole)]
        else:
            outputs = [
                m(hidden_states=x, position_embeddings=tables, attention_mask=None)[0] for m in (attention, whole)
            ]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    with pytest.raises(
        ValueError, match="LlamaAttention got no rotary embeddings, which its kept coordinates refer to"
    ):
        attention(x)


def test_a_geometry_goes_through_json():
    for geometry in (
        Geometry({"head_dim": 4}, rotary=KEPT),
        Geometry(shapes={"weight": (3, 2)}, experts=(0, 0, 1)),
        Geometry(),
    ):
        assert Geometry.from_json(json.loads(json.dumps(geometry.to_json()))) == geometry
    assert Geometry({"head_dim": 4}).to_json() == {"attributes": {"head_dim": 4}}


def test_a_newer_geometry_and_a_damaged_one_are_refused_in_one_line():
    with pytest.raises(ValueError, match="unknown entries in a module's geometry: strides; a newer Eckart wrote it"):
        EckartConfig(geometry={"a": {"attributes": {}, "strides": 3}})
    with pytest.raises(ValueError, match=r"config\.json describes the shape of a by 3; the checkpoint is damaged"):
        EckartConfig(geometry={"a": 3})


def test_a_checkpoint_of_an_older_version_has_no_geometry():
    config = EckartConfig.from_dict({"quant_method": "eckart", "version": 1, "modules": {}, "history": []})
    assert config.geometry == {}
    assert "geometry" not in config.to_dict()


def test_a_module_without_the_attribute_is_left_as_it_was():
    module = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="Linear has no head_dim; transformers may have changed it"):
        set_geometry(module, Geometry({"out_features": 1, "head_dim": 4}))
    assert module.out_features == 2
    assert geometry_of(module) is None


def test_a_new_geometry_takes_the_place_of_the_old_one():
    attention = narrowed().model.layers[0].self_attn
    set_geometry(attention, Geometry({"head_dim": 4}, rotary=(1, 3, 5, 7)))
    assert len(attention._forward_pre_hooks) == 1
    remove_geometry(attention)
    assert len(attention._forward_pre_hooks) == 0
    assert geometry_of(attention) is None


def test_parameters_of_the_stated_shape_keep_their_values():
    module = nn.Linear(3, 2)
    weight, bias = module.weight, module.bias
    set_geometry(module, Geometry(shapes={"weight": (2, 3), "bias": (5,)}))
    assert module.weight is weight
    assert module.bias is not bias
    assert module.bias.shape == (5,)


@pytest.mark.parametrize("form", ["top_k_index", "place"])
def test_experts_that_were_merged_answer_for_those_the_router_knows(form):
    class Bank(nn.Module):
        def forward(self, hidden, top_k_index, top_k_weights):
            return top_k_index

    bank = Bank()
    set_geometry(bank, Geometry(experts=(0, 0, 1, 0)))
    chosen = torch.tensor([[3, 2], [1, 4]])  # 4: none
    args = (torch.ones(2, 3),)
    found = bank(*args, chosen, None) if form == "place" else bank(*args, top_k_index=chosen, top_k_weights=None)
    assert found.tolist() == [[0, 1], [0, 2]]


def test_a_copy_of_a_model_has_hooks_of_its_own():
    model = narrowed()
    twin = copy.deepcopy(model)
    assert torch.equal(tiny_models.logits(twin), tiny_models.logits(model))
    remove_geometry(twin.model.layers[0].self_attn)
    assert len(model.model.layers[0].self_attn._forward_pre_hooks) == 1
    assert len(twin.model.layers[0].self_attn._forward_pre_hooks) == 0


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
def test_plain_from_pretrained_puts_it_on_again(auto, tmp_path):
    model = narrowed(1)
    mark(model)
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    name = "model.layers.1.self_attn"
    assert geometries(model) == {name: {"attributes": {"head_dim": 4}, "rotary": KEPT}}
    assert list(geometries(again)) == [name if auto is AutoModelForCausalLM else name.removeprefix("model.")]
    batch = tiny_models.inputs(model)
    one, other = (getattr(m, "model", m)(**batch).last_hidden_state for m in (model, again))
    assert torch.equal(one, other)
    # And once more, from what was loaded.
    again.save_pretrained(tmp_path / "again")
    third = auto.from_pretrained(tmp_path / "again")
    assert torch.equal(getattr(third, "model", third)(**batch).last_hidden_state, one)


def test_a_geometry_for_a_module_that_is_not_there(tmp_path):
    model = narrowed()
    mark(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    geometry = config["quantization_config"]["geometry"]
    geometry["model.layers.7.self_attn"] = geometry.pop("model.layers.0.self_attn")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"describes the layer model\.layers\.7\.self_attn, which LlamaForCausalLM"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
