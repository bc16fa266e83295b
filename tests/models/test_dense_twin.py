from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import tiny_models
from eckart.models.dense_twin import banks_to_convert, dense_twin
from mixtures import build
from model_state import assert_unchanged, snapshot

TWINS = {"mixtral": "MistralForCausalLM", "qwen3_moe": "Qwen3ForCausalLM"}


def mixture(family: str, **options: Any) -> Any:
    """With one expert, which every token visits with gate weight 1."""
    one = {"num_local_experts": 1, "num_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": True}
    return build(family, torch.float32, **one, **options)


@pytest.mark.parametrize("family", TWINS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"head_dim": 12},
        {"head_dim": None},
        {"sliding_window": 4, "use_sliding_window": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}},
        {"num_key_value_heads": 4, "hidden_act": "gelu", "rms_norm_eps": 0.3},
        {"attention_bias": True},
    ],
    ids=str,
)
def test_with_one_expert_the_twin_is_the_same_function(family, options, tmp_path):
    model = mixture(family, **options)
    before = snapshot(model)
    twin = dense_twin(model, {bank.name: bank.expert(0) for bank in banks_to_convert(model)})
    assert type(twin).__name__ == TWINS[family]
    torch.testing.assert_close(tiny_models.logits(twin), tiny_models.logits(model), rtol=0, atol=2e-6)
    routers = sum(layer.mlp.gate.weight.numel() for layer in model.model.layers)
    size = [sum(p.numel() for p in one.parameters()) for one in (model, twin)]
    assert size[0] - size[1] == routers
    own = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in own for p in twin.parameters())
    assert_unchanged(model, before)
    twin.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(twin)
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(twin))


def test_the_type_is_kept_and_the_global_random_state_too():
    model = mixture("mixtral").bfloat16()
    state = torch.get_rng_state()
    twin = dense_twin(model, {bank.name: bank.expert(0) for bank in banks_to_convert(model)})
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
    assert twin.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not twin.training


def test_layers_that_are_dense_already_stay_if_they_are_as_wide_as_an_expert():
    model = mixture("qwen3_moe", mlp_only_layers=[0], intermediate_size=24)
    banks = banks_to_convert(model)
    assert [bank.name for bank in banks] == ["model.layers.1.mlp.experts"]
    twin = dense_twin(model, {bank.name: bank.expert(0) for bank in banks})
    assert torch.equal(twin.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(tiny_models.logits(twin), tiny_models.logits(model), rtol=0, atol=2e-6)


def test_what_has_no_twin_is_refused_by_name():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be .* MixtralForCausalLM \(to MistralForCausalLM\)"):
        banks_to_convert(tiny_models.FAMILIES["llama"]())
    with pytest.raises(ValueError, match="mixes MLPs of widths 24, 48, and a dense model has one"):
        banks_to_convert(mixture("qwen3_moe", mlp_only_layers=[0]))
    with pytest.raises(ValueError, match="no layer with a bank of experts"):
        banks_to_convert(mixture("qwen3_moe", mlp_only_layers=[0, 1]))
