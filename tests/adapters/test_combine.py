"""Weighted sums of adapters."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

import tiny_models
from eckart import adapt
from eckart.adapters.layer import EckartLayer, base_weight

IDS = torch.arange(24).reshape(2, 12) % 60


def two(first: str = "pissa", second: str = "sorsa") -> PeftModel:
    """A tiny model with two adapters that have been moved at random."""
    model = adapt(tiny_models.FAMILIES["llama"]().eval(), first, rank=3, adapter_name="one", progress=False)
    adapt(model, second, rank=2, adapter_name="two", progress=False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "eckart_adapters" in name:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def deltas(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {
            key: layer.adapters([name])[0].delta(base_weight(layer.site, layer)).double()
            for key, layer in model.named_modules()
            if isinstance(layer, EckartLayer)
        }


@pytest.mark.parametrize(("first", "second"), [("pissa", "sorsa"), ("pissa", "spectral-ft"), ("svfit", "lora-xs")])
def test_the_exact_sum(first, second):
    model = two(first, second)
    one, other = deltas(model, "one"), deltas(model, "two")
    errors = model.base_model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", combination_type="cat")
    found = deltas(model, "sum")
    assert set(errors) == {key.removeprefix("base_model.model.") for key in found}
    assert max(errors.values()) < 1e-6
    for key, value in found.items():
        assert torch.allclose(value, 0.7 * one[key] - 0.4 * other[key], atol=1e-5)


def test_the_best_of_a_rank():
    model = two()
    one, other = deltas(model, "one"), deltas(model, "two")
    errors = model.base_model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    for key, value in deltas(model, "sum").items():
        wanted = one[key] + other[key]
        s = torch.linalg.svdvals(wanted)
        best = float(s[3:].square().sum().sqrt())  # the larger rank of the two is 3
        assert abs(float((value - wanted).norm()) - best) < 1e-4 * float(s[0])
        assert abs(errors[key.removeprefix("base_model.model.")] - best / float(s.norm())) < 1e-6


def test_it_is_an_adapter_like_any_other(tmp_path):
    model = two()
    model.base_model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", "cat")
    model.base_model.set_adapter("sum")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        loaded = PeftModel.from_pretrained(tiny_models.FAMILIES["llama"]().eval(), tmp_path / "sum").eval()
        assert torch.equal(loaded(input_ids=IDS).logits, expected)
        merged = model.merge_and_unload()
        assert torch.allclose(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["one", "none"], [1.0, 1.0], "sum"), "no adapter none; there is one, two"),
        ((["one"], [1.0, 1.0], "sum"), "1 adapters, but 2 weights"),
        ((["one"], [1.0], "two"), "there is an adapter 'two' already"),
        ((["one"], [float("nan")], "sum"), "weights must be finite"),
        ((["one"], [1.0], "sum", "ties"), "combination_type must be 'cat' or 'svd'"),
        ((["one"], [1.0], "sum", "svd", -1), "rank must be at least 1"),
    ],
)
def test_wrong_arguments_change_nothing(arguments, message):
    model = two()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"one", "two"}
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_is_trained_whole_is_not_added_in_silence():
    model = adapt(
        tiny_models.FAMILIES["llama"](), "pissa", 3, adapter_name="one", modules_to_save=["lm_head"], progress=False
    )
    with pytest.raises(ValueError, match="one trains lm_head whole, which cannot be added; merge it instead"):
        model.base_model.add_weighted_adapter(["one"], [1.0], "sum")
    assert set(model.peft_config) == {"one"}
