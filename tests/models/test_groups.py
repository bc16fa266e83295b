from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM, PhiConfig, PhiForCausalLM

import tiny_models
from eckart.models import blocks, evaluating, input_groups, linears

ATTENTION = [["q_proj", "k_proj", "v_proj"], ["o_proj"]]
GATED = [["gate_proj", "up_proj"], ["down_proj"]]
GROUPS = {
    **dict.fromkeys(["llama", "qwen3", "mistral", "gemma2", "gemma3"], ATTENTION + GATED),
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "gpt_neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    "mixtral": ATTENTION,
    "qwen3_moe": ATTENTION,
    "bert": [["query", "key", "value"], ["dense"], ["dense"], ["dense"]],
    "vit": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["fc1"], ["fc2"]],
}
T5_ENCODER = [["q", "k", "v"], ["o"], ["wi_0", "wi_1"], ["wo"]]
# The keys and values of cross attention read the encoder's output; the queries read the decoder.
T5_DECODER = [["q", "k", "v"], ["o"], ["q"], ["k", "v"], ["o"], ["wi_0", "wi_1"], ["wo"]]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_groups_of_every_family(family):
    model = tiny_models.FAMILIES[family]()
    groups = input_groups(model)
    last = [[name.rpartition(".")[2] for name in group] for group in groups]
    if family == "t5":
        assert last == T5_ENCODER * tiny_models.LAYERS + T5_DECODER * tiny_models.LAYERS
    else:
        assert last == GROUPS[family] * tiny_models.LAYERS
    assert sorted(name for group in groups for name in group) == sorted(ref.name for ref in linears(model).linears)
    names = [block.name for block in blocks(model)]
    for group in groups:
        assert len({next(n for n in names if name.startswith(n + ".")) for name in group}) == 1


@pytest.mark.parametrize("family", ["llama", "gemma3", "bert", "t5", "vit"])
def test_a_model_on_the_meta_device_can_be_grouped_if_its_forward_reads_no_values(family):
    model = tiny_models.FAMILIES[family]()
    expected = input_groups(model)
    assert input_groups(model.to("meta")) == expected


def test_a_model_that_accelerate_offloads_can_be_grouped():
    model = tiny_models.FAMILIES["llama"]()
    expected = input_groups(model)
    cpu_offload(model, execution_device="cpu")
    assert input_groups(model) == expected


def test_parallel_attention_and_mlp_share_their_input():
    config = PhiConfig(vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    groups = input_groups(PhiForCausalLM(config))
    assert [name.rpartition(".")[2] for name in groups[0]] == ["q_proj", "k_proj", "v_proj", "fc1"]


def test_a_block_that_is_run_twice_is_grouped_by_all_its_inputs():
    config = AlbertConfig(
        vocab_size=16,
        embedding_size=8,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    groups = input_groups(AlbertForMaskedLM(config))
    assert [name.rpartition(".")[2] for name in groups[0]] == ["query", "key", "value"]
    assert [len(group) for group in groups] == [3, 1, 1, 1]


class _Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({k: nn.Linear(3, 3) for k in "abcd"}) for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            y = layer["a"](input=x)
            x += 1  # the same memory holds another input now
            x = y + layer["b"](x) + layer["c"](x.detach())
        return x


def test_writes_in_place_keywords_and_layers_that_do_not_run():
    groups = input_groups(_Toy(), batch={"x": torch.ones(2, 3)})
    expected = [[f"layers.{i}.{k}" for k in keys] for i in range(2) for keys in ("a", "bc")]
    assert groups == [*expected, ["layers.0.d"], ["layers.1.d"]]


def test_only_the_selected_layers_and_outside_of_the_blocks():
    model = tiny_models.FAMILIES["llama"]()
    assert input_groups(model, ["layers.1.*.v_proj", "layers.1.*.q_proj", "lm_head"]) == [
        ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"],
        ["lm_head"],
    ]


def test_the_model_is_left_as_it_was():
    model = tiny_models.FAMILIES["opt"]()
    model.train()
    model.model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with torch.inference_mode():
        groups = input_groups(model)
    assert [len(group) for group in groups] == [3, 1, 1, 1] * 2
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        input_groups(model, batch={"attention_mask": torch.ones(1, 4)})
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert [module.training for module in model.modules()] == modes


def test_evaluating_restores_modes_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())

    def fail() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False]
