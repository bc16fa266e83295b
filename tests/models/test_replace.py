from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from torch import nn

import tiny_models
from eckart.models import linears, replace
from eckart.structures import Dense, LowRank, Sum


def _one(model: nn.Module, where: str):
    return linears(model, where).linears[0]


@pytest.mark.parametrize("form", ["plain", "pivoted"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_full_rank_keeps_the_logits(family, form):
    model = tiny_models.FAMILIES[family]().double()
    # The fused kernel for experts has no float64.
    model.config._experts_implementation = "eager"
    expected = tiny_models.logits(model)
    names = tiny_models.low_rank(model, form)
    assert names
    assert all(isinstance(model.get_submodule(name), LowRank) for name in names)
    torch.testing.assert_close(tiny_models.logits(model), expected, rtol=0, atol=1e-10)


def test_a_lower_rank_changes_the_logits():
    model = tiny_models.FAMILIES["llama"]()
    expected = tiny_models.logits(model)
    tiny_models.low_rank(model, rank=5)
    assert (tiny_models.logits(model) - expected).abs().max() > 0.1


def test_device_dtype_mode_and_gradients_follow_the_old_layer():
    model = tiny_models.FAMILIES["opt"]().to(torch.bfloat16).train()
    ref = _one(model, "layers.0.fc1")
    ref.module.requires_grad_(False)
    structure = LowRank.from_factors(torch.ones(48, 2), torch.ones(2, 32), bias=torch.zeros(48)).eval()
    replace(model, ref.name, structure)
    assert model.model.decoder.layers[0].fc1 is structure
    assert {p.dtype for p in structure.parameters()} == {torch.bfloat16}
    assert structure.order.dtype == torch.int32
    assert structure.training
    assert not any(p.requires_grad for p in structure.parameters())
    other = _one(model, "layers.1.fc1")
    replace(model, other.name, Dense.from_weight(other.weight.detach(), bias=other.bias).requires_grad_(False))
    assert all(p.requires_grad for p in model.model.decoder.layers[1].fc1.parameters())


def test_hooks_move_and_their_handles_still_remove_them():
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    calls: list[str] = []
    old = model[0]
    handles = [
        old.register_forward_pre_hook(lambda m, a: calls.append("pre")),
        old.register_forward_pre_hook(lambda m, a, k: calls.append("pre with keywords"), with_kwargs=True),
        old.register_forward_hook(lambda m, a, o: calls.append("post")),
        old.register_forward_hook(lambda m, a, k, o: calls.append("post with keywords"), with_kwargs=True),
        old.register_forward_hook(lambda m, a, o: calls.append("always"), always_call=True),
        old.register_full_backward_pre_hook(lambda m, g: calls.append("backward pre")),
        old.register_full_backward_hook(lambda m, i, o: calls.append("backward")),
    ]
    structure = Dense.from_weight(torch.eye(3))
    structure.register_forward_hook(lambda m, a, o: calls.append("own"))
    replace(model, "0", structure)
    model(torch.ones(1, 3, requires_grad=True)).sum().backward()
    forward = ["pre", "pre with keywords", "post", "post with keywords", "always", "own"]
    assert calls == [*forward, "backward pre", "backward"]
    calls.clear()
    for handle in handles:
        handle.remove()
    model(torch.ones(1, 3, requires_grad=True)).sum().backward()
    assert calls == ["own"]
    old(torch.ones(1, 3))
    assert calls == ["own"]  # the old layer has none of them


def test_always_called_hooks_run_after_an_error():
    model, calls = nn.Sequential(nn.Linear(3, 3, bias=False)), []
    model[0].register_forward_hook(lambda m, a, o: calls.append("always"), always_call=True)
    replace(model, "0", Dense.from_weight(torch.eye(3)))
    with pytest.raises(RuntimeError):
        model(torch.ones(1, 4))
    assert calls == ["always"]


def test_accelerate_goes_on_offloading_with_the_new_tensors():
    model = tiny_models.FAMILIES["opt"]()
    structures = {}
    for ref in linears(model, ["fc1", "q_proj"]).linears:
        structure = Sum([Dense.from_weight(0.5 * ref.weight.detach()) for _ in range(2)], bias=True)
        structure.bias.data.copy_(ref.bias)
        structures[ref.name] = structure
    batch = tiny_models.inputs(model)
    expected = model(**batch).logits
    cpu_offload(model, execution_device="cpu")
    for name, structure in structures.items():
        replace(model, name, structure)
        assert {p.device.type for p in structure.parameters()} == {"meta"}  # offloaded again
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    assert {p.device.type for name in structures for p in model.get_submodule(name).parameters()} == {"meta"}


class _Count(ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def test_a_chain_of_accelerate_hooks_is_attached_to_the_new_layer_and_not_to_the_old():
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    old, count = model[0], _Count()
    add_hook_to_module(old, SequentialHook(AlignDevicesHook("cpu"), count))
    structure = Dense.from_weight(torch.eye(3))
    replace(model, "0", structure)
    assert torch.equal(model(torch.ones(1, 3)), torch.ones(1, 3))
    assert not hasattr(old, "_hf_hook")
    assert type(old).forward is nn.Linear.forward
    assert [type(hook) for hook in structure._hf_hook.hooks] == [AlignDevicesHook, _Count]
    assert structure._hf_hook.hooks[1].calls == 1


def test_a_weightless_model_keeps_real_factors_where_they_are():
    model = tiny_models.FAMILIES["llama"]().to("meta")
    name = "model.layers.0.self_attn.o_proj"
    structure = Dense.from_weight(torch.eye(32, dtype=torch.float64))
    replace(model, name, structure)
    assert structure.device.type == "cpu"
    assert structure.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "structure", "message"),
    [
        ("model.decoder.layers.0.fc3", Dense(32, 48), "no layer 'model.decoder.layers.0.fc3'; nearest: .*fc1"),
        ("model.decoder.layers.0", Dense(32, 48), "is a OPTDecoderLayer, not a linear layer"),
        ("model.decoder.layers.0.fc1", Dense(48, 32, bias=True), r"is 48 x 32 \(out x in\), the structure 32 x 48"),
        ("model.decoder.layers.0.fc1", Dense(32, 48), "has a bias and the structure has none"),
        ("model.decoder.layers.0.fc1", Dense(32, 48, bias=True, device="meta"), "holds no data"),
        ("lm_head", Dense(32, 128), "tied with model.decoder.embed_tokens.weight"),
    ],
    ids=["name", "block", "shape", "bias", "meta", "tied"],
)
def test_refusals_leave_the_model_unchanged(name, structure, message):
    model = tiny_models.FAMILIES["opt"]()
    expected = {key: (id(module), module.training) for key, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        replace(model, name, structure)
    assert {key: (id(module), module.training) for key, module in model.named_modules()} == expected


def test_structures_can_be_replaced_too():
    model = tiny_models.FAMILIES["llama"]()
    names = tiny_models.low_rank(model, rank=6)
    expected = tiny_models.logits(model)
    for ref in linears(model).linears:
        replace(model, ref.name, Dense.from_weight(ref.weight.detach()))
    assert [type(model.get_submodule(name)) for name in names] == [Dense] * len(names)
    torch.testing.assert_close(tiny_models.logits(model), expected, rtol=1e-4, atol=1e-5)
