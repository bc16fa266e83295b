"""A model with adapters: its merged weights, and the model under them, without a change to either."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, OFTConfig, get_peft_model

import eckart
from eckart.models import linears
from eckart.models.adapted import AdaptedRef, adapted_linears, adapted_modules, is_adapted, under_adapters
from eckart.models.lora import lora_on
from model_state import assert_unchanged, snapshot
from tiny_models import FAMILIES, logits, low_rank


def _noise(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _adapted(family: str, kind: str) -> Any:
    base = FAMILIES[family]()
    names = [ref.name for ref in linears(base).linears]
    if kind in ("pissa", "loldu", "corda"):
        data = [torch.arange(12)] if kind == "corda" else None
        return _noise(eckart.adapt(base, kind, 2, data=data, progress=False))
    lora = {"r": 2, "target_modules": names, "fan_in_fan_out": family == "gpt2"}
    config = {
        "lora": lambda: LoraConfig(**lora),
        "dora": lambda: LoraConfig(**lora, use_dora=True),
        "head": lambda: LoraConfig(**lora, modules_to_save=["lm_head"]),
        "loha": lambda: LoHaConfig(r=2, target_modules=names),
        "oft": lambda: OFTConfig(oft_block_size=4, target_modules=names),
    }[kind]()
    return _noise(get_peft_model(base, config))


CASES = [
    *((family, kind) for family in ("llama", "gpt2") for kind in ("lora", "dora", "pissa", "loldu")),
    *(("llama", kind) for kind in ("head", "loha", "oft", "corda")),
    ("phi3", "lora"),
]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_weights_are_those_of_the_merged_model_and_nothing_changes(family, kind):
    model, base = _adapted(family, kind), FAMILIES[family]()
    before = snapshot(model)
    weights = {ref.name: ref.weight for ref in adapted_linears(model, "*").linears}
    under = {ref.name: ref.weight.clone() for ref in linears(under_adapters(model), "*").linears}
    assert_unchanged(model, before)
    assert under.keys() == weights.keys() == {ref.name for ref in linears(base, "*").linears}
    assert all(torch.equal(under[ref.name], ref.weight) for ref in linears(base, "*").linears)
    merged = {ref.name: ref.weight for ref in linears(model.merge_and_unload(), "*").linears}
    moved = 0
    for name, weight in merged.items():
        assert torch.allclose(weights[name].float(), weight, atol=1e-5), name
        moved += not torch.allclose(weight, under[name], atol=1e-3)
    assert moved == (15 if kind == "head" else len(linears(base).linears))


def test_the_model_under_the_adapters_computes_what_the_base_does():
    model, base = _adapted("llama", "lora"), FAMILIES["llama"]()
    assert torch.equal(logits(under_adapters(model)), logits(base))
    assert is_adapted(model)
    assert not is_adapted(base)
    assert under_adapters(base) is base
    assert adapted_modules(model) == [ref.name for ref in linears(base).linears]


def test_a_change_of_an_adapter_has_its_rank():
    for ref in adapted_linears(_adapted("llama", "lora")).linears:
        assert isinstance(ref, AdaptedRef)
        s = torch.linalg.svdvals(ref.delta())
        assert float(s[1]) > 1e-3 * float(s[0])
        assert float(s[2]) < 1e-12 * float(s[0])


def test_two_active_adapters_and_none():
    model = eckart.adapt(FAMILIES["llama"](), "pissa", 2, progress=False)
    model.add_adapter("second", eckart.adapters.EckartConfig(method="pissa", r=3))
    model.base_model.set_adapter(["default", "second"])
    _noise(model)
    weights = [ref.weight for ref in adapted_linears(model).linears]
    twin = copy.deepcopy(model)
    twin.base_model.merge_adapter(["default", "second"])
    for weight, ref in zip(weights, linears(under_adapters(twin)).linears, strict=True):
        assert torch.allclose(weight, ref.weight, atol=1e-5)
    with model.disable_adapter():
        assert not any(ref.delta().any() for ref in adapted_linears(model).linears if isinstance(ref, AdaptedRef))


def test_an_adapter_on_structures():
    base = FAMILIES["llama"]()
    low_rank(base, rank=4)
    dense = {ref.name: ref.weight.detach().clone() for ref in linears(base).linears}
    model = _noise(eckart.adapt(base, "pissa", 2, progress=False))
    for ref in adapted_linears(model).linears:
        assert isinstance(ref, AdaptedRef)
        assert torch.allclose(ref.weight - ref.delta(), dense[ref.name], atol=1e-5)
        assert float(ref.delta().norm()) > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_lora_of_given_factors(family):
    base = FAMILIES[family]()
    before = {ref.name: ref.weight.detach().clone() for ref in linears(base).linears}
    generator = torch.Generator().manual_seed(0)
    factors = {
        ref.name: (
            torch.randn(ref.shape[0], 2 + i % 2, generator=generator),
            torch.randn(2 + i % 2, ref.shape[1], generator=generator),
        )
        for i, ref in enumerate(linears(base).linears)
        if "mlp" in ref.name
    }
    model = lora_on(base, factors)
    for ref in adapted_linears(model).linears:
        b, a = factors.get(ref.name, (torch.zeros(ref.shape[0], 1), torch.zeros(1, ref.shape[1])))
        assert torch.allclose(ref.weight.float(), before[ref.name] + b @ a, atol=1e-5)
