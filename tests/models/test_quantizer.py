from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import auto

import tiny_models
from eckart.models import EckartConfig, EckartQuantizer, export_dense, mark, save, specs
from eckart.structures import Dense, LowRank, Sum


def test_the_classes_are_in_the_tables_of_transformers():
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["eckart"] is EckartConfig
    assert auto.AUTO_QUANTIZER_MAPPING["eckart"] is EckartQuantizer


def test_a_config_goes_through_json():
    modules = {"a.b": {"type": "low_rank", "in_features": 3, "out_features": 4, "rank": 2}}
    config = EckartConfig(modules, history=[{"verb": "compress"}, "text", 3])
    again = auto.AutoQuantizationConfig.from_dict(json.loads(config.to_json_string()))
    assert isinstance(again, EckartConfig)
    assert (
        again.to_dict()
        == config.to_dict()
        == {
            "quant_method": "eckart",
            "version": 1,
            "modules": modules,
            "history": [{"verb": "compress"}, "text", 3],
        }
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"version": 2, "modules": 3, "new": 1},
            "format 2 and this Eckart reads up to 1: pip install --upgrade eckart",
        ),
        ({"version": "next"}, "format 'next'"),
        ({"nonsense": 1}, "unknown keys in the eckart part of config.json: nonsense"),
        ({"modules": {"a": 3}}, "describes a without a structure type"),
        ({"modules": {"a": {"rank": 3}}}, "describes a without a structure type"),
    ],
)
def test_a_config_that_cannot_be_understood(entry, message):
    with pytest.raises(ValueError, match=message):
        EckartConfig.from_dict({"quant_method": "eckart", **entry})


def test_specs_names_structures_and_not_their_parts():
    model = tiny_models.FAMILIES["llama"]()
    assert specs(model) == {}
    both = Sum([Dense.from_weight(torch.ones(48, 32)), LowRank.from_factors(torch.ones(48, 1), torch.ones(1, 32))])
    model.model.layers[1].mlp.up_proj = both
    found = specs(model)
    assert list(found) == ["model.layers.1.mlp.up_proj"]
    assert found["model.layers.1.mlp.up_proj"] == both.spec()


def test_mark_adds_to_the_history_and_an_empty_model_becomes_an_ordinary_one():
    model = tiny_models.FAMILIES["llama"]()
    mark(model, ["ignored, since nothing was done"])
    assert not hasattr(model, "hf_quantizer")
    names = tiny_models.low_rank(model, rank=6)
    mark(model, ["one"])
    mark(model)
    mark(model, ["two", {"three": 3.0}])
    assert model.config.quantization_config.history == ["one", "two", {"three": 3.0}]
    assert set(model.config.quantization_config.modules) == set(names)
    assert model.quantization_method == "eckart"
    model.float()  # transformers forbids this for models that are quantized
    model.dequantize()
    mark(model, ["four"])
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("history", [[object()], [float("nan")], [{1, 2}]])
def test_a_history_that_is_not_json_is_refused_before_anything_changes(history, tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    tiny_models.low_rank(model, rank=6)
    with pytest.raises(ValueError, match="the history must hold JSON values only"):
        save(model, tmp_path / "model", history=history)
    assert not hasattr(model, "hf_quantizer")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "foreign", [BitsAndBytesConfig(load_in_8bit=True), {"quant_method": "gptq"}], ids=["object", "dict"]
)
def test_a_model_that_another_method_quantized_is_refused(foreign):
    model = tiny_models.FAMILIES["llama"]()
    tiny_models.low_rank(model, rank=6)
    model.config.quantization_config = foreign
    with pytest.raises(ValueError, match=r"quantized with (bitsandbytes|gptq); load it dequantized"):
        mark(model)


def test_a_dense_checkpoint_cannot_be_loaded_with_our_config(tmp_path):
    path = export_dense(tiny_models.FAMILIES["llama"](), tmp_path / "model")
    with pytest.raises(ValueError, match=r"to compress a dense one use eckart\.compress"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=EckartConfig())


def test_what_the_quantizer_says_about_itself():
    quantizer = EckartQuantizer(EckartConfig(), pre_quantized=True)
    assert quantizer.is_serializable()
    assert quantizer.is_trainable
    assert quantizer.is_qat_trainable
    assert quantizer.is_compileable
    assert not quantizer.requires_calibration
    assert quantizer.update_dtype(torch.bfloat16) is torch.bfloat16
