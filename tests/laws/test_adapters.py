"""What is true of every adapter, whatever its mathematics."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn

import tiny_models
from eckart import adapt, catalog
from eckart.adapters import EckartConfig
from eckart.adapters.layer import EckartLayer, base_weight
from eckart.adapters.site import Site

METHODS = [row.name for row in catalog.select(family="adapters") if row.status != "planned"]
RULES = {method: EckartConfig(method=method).build_method() for method in METHODS}
every = pytest.mark.parametrize("method", METHODS)
mergeable = pytest.mark.parametrize("method", [method for method in METHODS if RULES[method].mergeable])
input_dependent = pytest.mark.parametrize("method", [method for method in METHODS if not RULES[method].mergeable])
RANK = 4
IDS = torch.arange(24).reshape(2, 12) % 60
DATA = [{"input_ids": (torch.arange(96).reshape(4, 24) * 7) % 60}]


def base() -> nn.Module:
    return tiny_models.FAMILIES["llama"]().eval()


def adapted(method: str, model: nn.Module | None = None, **settings) -> PeftModel:
    model = base() if model is None else model
    needs = EckartConfig(method=method).build_method().needs
    return adapt(model, method, rank=RANK, data=DATA if needs else None, progress=False, **settings).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def move(model: nn.Module, seed: int = 1) -> None:
    """Random values in everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def whole_modules(model: PeftModel) -> dict[str, nn.Module]:
    """The originals of the modules that are trained whole, by their names in the base."""
    return {
        name.removeprefix("base_model.model."): module.original_module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    # Weights of the tiny models are of order 0.1 and logits of order 1: float32 rounding over four layers.
    return torch.allclose(a, b, rtol=1e-4, atol=2e-5)


@every
def test_only_the_adapter_is_trained_and_the_count_is_the_formula(method):
    model = adapted(method)
    config = model.peft_config["default"]
    rule = config.build_method()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, EckartLayer)}
    assert layers
    sites = {name: layer.site for name, layer in layers.items()}
    ranks = {name: layer.eckart_adapters["default"].rank for name, layer in layers.items()}
    whole = whole_modules(model)
    assert bool(whole) == rule.whole_modules
    expected = rule.total_trainable(sites, ranks) + sum(p.numel() for m in whole.values() for p in m.parameters())
    assert model.get_nb_trainable_parameters()[0] == expected
    places = ("eckart_adapters", *(f"{name}.modules_to_save.default." for name in whole))
    assert all(any(place in name for place in places) for name, p in model.named_parameters() if p.requires_grad)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@every
def test_the_base_is_not_touched(method):
    reference = base()
    expected = logits(reference)
    weights = copy.deepcopy(reference.state_dict())
    model = adapted(method, reference)
    move(model)
    assert not close(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    whole = whole_modules(model)
    for name, module in whole.items():
        assert all(torch.equal(value, weights[f"{name}.{key}"]) for key, value in module.state_dict().items())
    left = model.unload()
    for name, module in whole.items():  # PEFT keeps what was trained whole when it unloads
        left.set_submodule(name, module)
    assert torch.equal(logits(left), expected)
    assert left.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in left.state_dict().items())


@every
def test_saved_and_loaded_it_answers_the_same(method, tmp_path):
    model = adapted(method)
    move(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    names = {name for name, p in trainable.named_parameters() if p.requires_grad}
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    low_memory = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(low_memory), expected)


@mergeable
def test_merged_it_computes_what_it_did_before(method):
    model = adapted(method)
    move(model)
    expected = logits(model)
    original = {n: m.get_base_layer().weight.clone() for n, m in model.named_modules() if isinstance(m, EckartLayer)}
    model.merge_adapter(safe_merge=True)
    assert close(logits(model), expected)
    model.unmerge_adapter()
    for name, module in model.named_modules():
        if isinstance(module, EckartLayer):
            assert torch.equal(module.get_base_layer().weight, original[name])
    merged = model.merge_and_unload()
    assert not any(isinstance(module, EckartLayer) for module in merged.modules())
    assert close(logits(merged), expected)


@input_dependent
def test_what_is_no_linear_map_is_not_merged(method):
    model = adapted(method)
    move(model)
    expected = logits(model)
    for action in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"model\.layers\.0\."):
            action()
        assert torch.equal(logits(model), expected)


@mergeable
def test_delta_is_what_the_layer_adds_to_its_weight(method):
    model = adapted(method)
    move(model)
    for layer in model.modules():
        if isinstance(layer, EckartLayer):
            weight = layer.merged_weight()
            x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(0))
            bias = layer.get_base_layer().bias
            expected = x @ weight.mT + (0 if bias is None else bias)
            with torch.no_grad():
                assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-5)
            adapter = layer.eckart_adapters["default"]
            if adapter.low_rank() is not None:
                left, right = adapter.low_rank()
                assert torch.allclose(left @ right, adapter.delta(base_weight(layer.site, layer)), atol=1e-6)


@every
def test_a_gradient_reaches_everything_that_is_trained_within_a_few_steps(method):
    steps = 12 if method == "ce-ssl" else 2  # it leaves layers out at random
    model = adapted(method)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for step in range(1, steps + 1):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.base_model.on_step(step, 100)
        optimizer.zero_grad()
    still = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert still == []


@every
def test_several_adapters_on_one_base(method):
    model = adapted(method)
    move(model)
    first = logits(model)
    needs = model.peft_config["default"].build_method().needs
    adapt(model, method, rank=2, adapter_name="second", data=DATA if needs else None, progress=False, seed=3)
    model.eval()
    assert model.active_adapters == ["second"]
    move(model, seed=2)
    second = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert {p.requires_grad for n, p in model.named_parameters() if ".second." in n} == {False}
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    if RULES[method].whole_modules:
        with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
            model.base_model.set_adapter(["default", "second"])
        model.set_adapter("second")
        assert torch.equal(logits(model), second)
    else:
        model.base_model.set_adapter(["default", "second"])
        both = logits(model)
        assert not close(both, first)
        assert not close(both, second)
        if RULES[method].mergeable:
            model.merge_adapter()
            assert close(logits(model), both)
            model.unmerge_adapter()
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


@every
def test_it_works_on_a_half_precision_base(method):
    reference = base().to(torch.bfloat16)
    model = adapted(method, reference)
    layers = [module for module in model.modules() if isinstance(module, EckartLayer)]
    tensors = [tensor for layer in layers for tensor in layer.eckart_adapters.state_dict().values()]
    # What is an index stays one: half precision cannot count.
    assert {tensor.dtype for tensor in tensors} <= {torch.float32, torch.int64}
    assert logits(model).dtype == torch.bfloat16
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert grads
    assert all(bool(grad.isfinite().all()) for grad in grads)


@mergeable
def test_it_works_on_transposed_fused_and_biased_layers(method):
    for family in ("gpt2", "opt", "phi3"):
        torch.manual_seed(0)
        reference = tiny_models.FAMILIES[family]().eval()
        model = adapted(method, reference)
        move(model)
        expected = logits(model)
        assert close(logits(model.merge_and_unload()), expected), family


@every
def test_a_seed_repeats_itself(method):
    one, two = adapted(method), adapted(method)
    for (name, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@every
def test_a_rank_that_does_not_fit_changes_nothing(method):
    reference = base()
    with pytest.raises(ValueError, match=r"cannot adapt model\.layers\.0\.self_attn\.\w+: it .*rank"):
        get_peft_model(reference, EckartConfig(method=method, r=1000, initialized=True))
    assert not any(isinstance(module, EckartLayer) for module in reference.modules())
    assert all(p.requires_grad for p in reference.parameters())


@every
def test_options_are_frozen_and_plain_data(method):
    rule = EckartConfig(method=method).build_method()
    assert rule.__dataclass_params__.frozen
    again = type(rule)(**dataclasses.asdict(rule))
    assert again == rule


@every
def test_what_it_builds_is_saved_whole(method):
    """Every tensor of an adapter is a parameter or a persistent buffer: nothing is lost in a file."""
    rule = EckartConfig(method=method).build_method()
    adapter = rule.build(Site("layer", "linear", 16, 12), 3, 1.0)
    held = {name for name, value in vars(adapter).items() if isinstance(value, torch.Tensor)}
    assert held == set()
    assert {name for name, _ in adapter.named_buffers()} <= adapter.state_dict().keys()
