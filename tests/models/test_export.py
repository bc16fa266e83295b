from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny_models
from eckart.models import export_dense, linears, load, save
from eckart.structures import Dense, LowRank, Structure

# Runs where Eckart cannot be imported: what is exported must not need it.
_WITHOUT_ECKART = """
import sys
sys.modules["eckart"] = None
sys.path = [p for p in sys.path if p not in ("", {root!r})]
import torch, transformers
for path in sys.argv[1:]:
    config = transformers.AutoConfig.from_pretrained(path)
    assert not hasattr(config, "quantization_config")
    model, info = getattr(transformers, config.architectures[0]).from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    batch = torch.load(path + "/batch.pt")
    with torch.no_grad():
        torch.save(model(**batch).logits, path + "/logits.pt")
"""


def test_every_family_loads_without_eckart(tmp_path):
    expected = {}
    for family, build in tiny_models.FAMILIES.items():
        model = build()
        tiny_models.low_rank(model, rank=6)
        path = export_dense(model, tmp_path / family)
        assert linears(model).linears[0].kind == "structure"  # the model itself is as before
        torch.save(tiny_models.inputs(model), path / "batch.pt")
        expected[path] = tiny_models.logits(model)
    code = _WITHOUT_ECKART.format(root=str(Path(tiny_models.__file__).parents[1] / "src"))
    subprocess.run([sys.executable, "-c", code, *map(str, expected)], check=True)
    for path, logits in expected.items():
        torch.testing.assert_close(torch.load(path / "logits.pt"), logits, rtol=1e-4, atol=2e-5, msg=str(path))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_exported_weights_are_the_dense_ones_bit_by_bit(family, tmp_path):
    model = tiny_models.FAMILIES[family]().to(torch.bfloat16)
    names = tiny_models.low_rank(model, rank=6)
    exported, _ = load(export_dense(model, tmp_path / "model"))
    fresh = tiny_models.FAMILIES[family]()
    for name in names:
        layer, structure = exported.get_submodule(name), model.get_submodule(name)
        assert type(layer) is type(fresh.get_submodule(name))
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        assert torch.equal(weight, structure.dense())
        assert (layer.bias is None) == (structure.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, structure.bias)
    others = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(tuple(names))}
    found = exported.state_dict()
    assert found.keys() == fresh.state_dict().keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in others.items())


def test_export_from_a_path_takes_the_tokenizer_and_the_generation_config_along(tmp_path):
    model = tiny_models.FAMILIES["gpt2"]()
    tiny_models.low_rank(model, rank=6)
    model.generation_config.max_new_tokens = 9
    path = save(model, tmp_path / "small")
    exported, _ = load(export_dense(path, tmp_path / "dense"))
    assert exported.generation_config.max_new_tokens == 9
    assert exported.lm_head.weight is exported.transformer.wte.weight
    with pytest.raises(FileExistsError):
        export_dense(path, tmp_path / "dense")
    export_dense(path, tmp_path / "dense", force=True)


def test_experts_of_a_loaded_model_are_written_as_they_were_read(tmp_path):
    model = tiny_models.FAMILIES["mixtral"]()
    tiny_models.low_rank(model, rank=6)
    original = export_dense(model, tmp_path / "one")
    again = export_dense(export_dense(original, tmp_path / "two"), tmp_path / "three")
    expected, found = load_file(original / "model.safetensors"), load_file(again / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (
            Dense.from_weight(torch.ones(16, 32)),
            "model.layers.1.mlp.up_proj is 16 x 32 and the dense model has 48 x 32",
        ),
        (Dense.from_weight(torch.ones(48, 32), bias=torch.ones(48)), "has a bias and the dense model has no place"),
    ],
    ids=["shape", "bias"],
)
def test_what_has_no_dense_form_is_refused_before_anything_is_written(structure, message, tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    model.model.layers[1].mlp.up_proj = structure
    with pytest.raises(ValueError, match=message):
        export_dense(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_bias_of_zeros_or_a_missing_one_is_no_obstacle(tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    weight = model.model.layers[1].mlp.up_proj.weight.detach()
    model.model.layers[1].mlp.up_proj = Dense.from_weight(weight, bias=torch.zeros(48))
    exported, _ = load(export_dense(model, tmp_path / "llama"))
    assert exported.model.layers[1].mlp.up_proj.bias is None
    model = tiny_models.FAMILIES["opt"]()
    model.model.decoder.layers[0].fc1 = LowRank.from_factors(torch.ones(48, 1), torch.ones(1, 32))
    exported, _ = load(export_dense(model, tmp_path / "opt"))
    assert torch.equal(exported.model.decoder.layers[0].fc1.bias, torch.zeros(48))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5"])
def test_dequantize_of_transformers(family, tmp_path):
    model = tiny_models.FAMILIES[family]()
    names = tiny_models.low_rank(model, rank=6)
    model, _ = load(save(model, tmp_path / "small"))
    model.double()
    expected, calls = tiny_models.logits(model), []
    model.get_submodule(names[0]).register_forward_hook(lambda *_: calls.append(1))
    assert model.dequantize() is model
    assert not any(isinstance(module, Structure) for module in model.modules())
    assert {type(model.get_submodule(name)) for name in names} == {Conv1D if family == "gpt2" else nn.Linear}
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(tiny_models.logits(model), expected, rtol=0, atol=1e-9)
    assert calls == [1]
    path = save(model, tmp_path / "dense")
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
