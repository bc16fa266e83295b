from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny_models
from eckart.models import blocks, linears
from eckart.structures import Dense

EXPERTS = {"mixtral": (4 * 96 * 32, 4 * 32 * 48), "qwen3_moe": (4 * 48 * 32, 4 * 32 * 24)}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_all_linears_of_the_blocks_and_nothing_else(family, device):
    model = tiny_models.FAMILIES[family]().to(device)
    expected = [
        f"{block.name}.{name}"
        for block in blocks(model)
        for name, module in block.module.named_modules()
        if type(module) in (nn.Linear, Conv1D)
    ]
    assert [ref.name for ref in linears(model).linears] == expected


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_matrix_in_the_blocks_is_either_selected_or_reported(family):
    model = tiny_models.FAMILIES[family]()
    selection = linears(model)
    accounted = {ref.name for ref in selection.linears} | {skipped.name for skipped in selection.skipped}
    for block in blocks(model):
        for name, parameter in block.module.named_parameters():
            full = f"{block.name}.{name}"
            if parameter.ndim >= 2:
                assert full in accounted or full.rpartition(".")[0] in accounted
    total = sum(p.numel() for block in blocks(model) for p in block.module.parameters() if p.ndim >= 2)
    taken = sum(ref.weight.numel() for ref in selection.linears)
    assert taken + sum(skipped.parameters for skipped in selection.skipped) == total


@pytest.mark.parametrize("family", EXPERTS)
def test_expert_banks_are_reported_by_name_with_their_size(family):
    selection = linears(tiny_models.FAMILIES[family]())
    found = {skipped.name: skipped for skipped in selection.skipped}
    for layer in range(tiny_models.LAYERS):
        for key, size in zip(("gate_up_proj", "down_proj"), EXPERTS[family], strict=True):
            skipped = found[f"model.layers.{layer}.mlp.experts.{key}"]
            assert skipped.parameters == size
            assert "3-D parameter" in skipped.reason
        assert "bare matrix" in found[f"model.layers.{layer}.mlp.gate.weight"].reason


def test_relative_position_tables_of_t5_are_reported():
    skipped = linears(tiny_models.FAMILIES["t5"]()).skipped
    assert [entry.name.rpartition(".")[0].rpartition(".")[2] for entry in skipped] == ["relative_attention_bias"] * 2
    assert all("embedding table (32 x 4)" in entry.reason for entry in skipped)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_weight_is_an_out_by_in_view(family):
    model = tiny_models.FAMILIES[family]()
    for ref in linears(model).linears:
        x = torch.randn(3, ref.in_features, generator=torch.Generator().manual_seed(0))
        bias = 0 if ref.bias is None else ref.bias
        torch.testing.assert_close(ref.module(x), x @ ref.weight.mT + bias, rtol=1e-5, atol=1e-5)
        assert ref.weight.shape == ref.shape == (ref.out_features, ref.in_features)
        assert ref.weight.untyped_storage().data_ptr() == ref.module.weight.untyped_storage().data_ptr()
        assert ref.kind == ("conv1d" if family == "gpt2" else "linear")


def test_structures_count_and_their_parts_do_not():
    model = tiny_models.FAMILIES["llama"]()
    before = [ref.name for ref in linears(model).linears]
    tiny_models.low_rank(model, rank=5)
    after = linears(model).linears
    assert [ref.name for ref in after] == before
    assert {ref.kind for ref in after} == {"structure"}
    assert after[0].weight.shape == after[0].shape == (32, 32)
    assert after[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("q_proj", 2),
        ("*.q_proj", 2),
        ("model.layers.1.*", 7),
        ("layers.1.*", 7),
        ("layers.[01].mlp.*", 6),
        (r"re:\.(q|k)_proj$", 4),
        ("lm_head", 1),
        (lambda name, module: module.out_features == 48, 4),
        (["q_proj", r"re:k_proj", lambda name, module: name.endswith("v_proj")], 6),
        (["q_proj", "self_attn.q_proj"], 2),
    ],
    ids=lambda value: str(value).split(" at 0x")[0],  # an address differs from process to process
)
def test_where(where, count):
    model = tiny_models.FAMILIES["llama"]()
    selection = linears(model, where)
    assert len(selection.linears) == count
    assert selection.skipped == []
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = {ref.name for ref in selection.linears}
    assert [ref.name for ref in selection.linears] == [name for name in names if name in chosen]


def test_everything_is_the_output_head_too_and_reports_the_embedding():
    selection = linears(tiny_models.FAMILIES["llama"](), "*")
    assert len(selection.linears) == 15
    assert selection.linears[-1].name == "lm_head"
    assert [entry.name for entry in selection.skipped] == ["model.embed_tokens.weight"]


def test_a_pattern_that_matches_nothing_names_the_nearest():
    model = tiny_models.FAMILIES["llama"]()
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.qproj' matches no layer; nearest: .*q_proj"):
        linears(model, "model.layers.0.self_attn.qproj")
    with pytest.raises(ValueError, match=r"'re:nothing\$' matches no layer"):
        linears(model, ["q_proj", "re:nothing$"])
    with pytest.raises(ValueError, match="matches no layer"):
        linears(model, lambda name, module: False)


@pytest.mark.parametrize(("family", "table"), [("opt", "model.decoder.embed_tokens"), ("gpt2", "transformer.wte")])
def test_a_tied_head_is_skipped_with_the_reason(family, table):
    selection = linears(tiny_models.FAMILIES[family](), "lm_head")
    assert selection.linears == []
    assert [entry.reason for entry in selection.skipped] == [f"tied with {table}.weight"]


def test_a_module_under_two_names_is_skipped():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(shared), nn.Sequential(nn.Linear(3, 3))])})
    model["again"] = shared
    selection = linears(model)
    assert [ref.name for ref in selection.linears] == ["layers.1.0"]
    assert [entry.reason for entry in selection.skipped] == ["tied with again.weight"]


def test_expert_banks_can_be_meant_by_name():
    selection = linears(tiny_models.FAMILIES["mixtral"](), "layers.0.mlp.experts.*")
    assert selection.linears == []
    assert [entry.name.rpartition(".")[2] for entry in selection.skipped] == ["gate_up_proj", "down_proj"]


class _Router(nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1)


class _Spelled(nn.Linear):
    def forward(self, x):
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (_Router(3, 4), "_Router computes more than a linear map"),
        (nn.Linear(3, 4).to(torch.float8_e4m3fn), "stored as torch.float8_e4m3fn; dequantize the model first"),
        (nn.MultiheadAttention(4, 2), "nn.MultiheadAttention reads this weight without calling the module"),
        (nn.Conv1d(3, 4, 5), "convolution kernel (4 x 3 x 5) of Conv1d"),
    ],
    ids=["router", "float8", "attention", "convolution"],
)
def test_what_only_looks_like_a_linear_map_is_reported(layer, reason):
    layers = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), layer) for _ in range(1))
    selection = linears(nn.ModuleDict({"layers": layers}))
    assert [ref.name for ref in selection.linears] == ["layers.0.0"]
    assert reason in [entry.reason for entry in selection.skipped]


def test_a_subclass_that_spells_out_the_product_is_a_linear_map():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(_Spelled(3, 4))])})
    assert [ref.name for ref in linears(model).linears] == ["layers.0.0"]


def test_norms_with_more_axes_are_not_reported():
    layers = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.LayerNorm((3, 3)))])
    assert linears(nn.ModuleDict({"layers": layers})).skipped == []


def test_models_without_linears_or_blocks():
    with pytest.raises(ValueError, match="Embedding has no linear layers"):
        linears(nn.Embedding(3, 3))
    flat = nn.Sequential(nn.Linear(3, 3), Dense(3, 3))
    with pytest.raises(ValueError, match=r"no repeated blocks .* where='\*'"):
        linears(flat)
    assert [ref.name for ref in linears(flat, "*").linears] == ["0", "1"]
