from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny_models
from eckart.models import InputTracker, block_of, blocks, example_inputs, same_input

LISTS = {
    "llama": ["model.layers"],
    "qwen3": ["model.layers"],
    "mistral": ["model.layers"],
    "gemma2": ["model.layers"],
    "gemma3": ["model.layers"],
    "phi3": ["model.layers"],
    "gpt2": ["transformer.h"],
    "opt": ["model.decoder.layers"],
    "gpt_neox": ["gpt_neox.layers"],
    "mixtral": ["model.layers"],
    "qwen3_moe": ["model.layers"],
    "bert": ["bert.encoder.layer"],
    "t5": ["encoder.block", "decoder.block"],
    "vit": ["vit.layers"],
}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_blocks_of_every_family(family):
    model = tiny_models.FAMILIES[family]()
    found = blocks(model)
    expected = [f"{name}.{index}" for name in LISTS[family] for index in range(tiny_models.LAYERS)]
    assert [block.name for block in found] == expected
    assert [block.list_name for block in found] == [name.rpartition(".")[0] for name in expected]
    for block in found:
        assert model.get_submodule(block.name) is block.module


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_blocks_run_in_the_order_in_which_they_are_listed(family):
    model = tiny_models.FAMILIES[family]()
    found, ran = blocks(model), []
    for block in found:
        block.module.register_forward_hook(lambda module, args, output: ran.append(module))
    tiny_models.logits(model)
    assert ran == [block.module for block in found]


class _Attention(nn.TransformerEncoderLayer):
    pass


class _Recurrent(nn.TransformerEncoderLayer):
    pass


def test_layers_of_two_classes_with_a_common_base_are_blocks():
    model = nn.ModuleDict({"layers": nn.ModuleList([_Attention(8, 2, 16), _Recurrent(8, 2, 16)])})
    assert [block.name for block in blocks(model)] == ["layers.0", "layers.1"]


@pytest.mark.parametrize(
    "children",
    [
        [],
        [nn.Linear(2, 2), nn.Linear(2, 2)],  # heads, not blocks
        [nn.Sequential(nn.Conv1d(2, 2, 1)), nn.Sequential(nn.Conv1d(2, 2, 1))],  # no linear map in them
        [nn.Sequential(nn.Linear(2, 2)), nn.TransformerEncoderLayer(8, 2, 16)],  # no class in common
    ],
    ids=["empty", "heads", "convolutions", "mixed"],
)
def test_other_lists_are_not_blocks(children):
    assert blocks(nn.ModuleDict({"list": nn.ModuleList(children)})) == []


def test_lists_of_lists_are_searched():
    stage = [nn.ModuleList([nn.Sequential(nn.Linear(2, 2))]) for _ in range(2)]
    model = nn.Sequential(nn.ModuleList(stage))
    assert [block.name for block in blocks(model)] == ["0.0.0", "0.1.0"]


def test_block_of_does_not_confuse_names_with_a_common_beginning():
    model = nn.ModuleDict({"h": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(11))})
    found = blocks(model)
    assert block_of("h.10.0", found).name == "h.10"
    assert block_of("h.1", found).name == "h.1"
    assert block_of("head", found) is None


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_example_inputs_fit_every_family(family):
    model = tiny_models.FAMILIES[family]()
    with torch.no_grad():
        output = model(**example_inputs(model))
    assert output.logits.shape[0] == 1
    assert torch.isfinite(output.logits).all()


def test_example_inputs_leave_the_random_state_alone_and_respect_the_length():
    model = tiny_models.FAMILIES["llama"]()
    before = torch.get_rng_state()
    assert example_inputs(model, tokens=10**6)["input_ids"].shape == (1, 64)
    assert torch.equal(torch.get_rng_state(), before)


def test_example_inputs_says_what_to_pass_for_other_models():
    with pytest.raises(ValueError, match=r"example batch for Linear .* pass batch="):
        example_inputs(nn.Linear(2, 2))


def test_tracker_tells_memory_shape_strides_and_writes_apart():
    tracker = InputTracker()
    x = torch.arange(12.0).reshape(3, 4)
    numbers = [tracker.key(t) for t in (x, x.detach(), x[:2], x.mT, x.reshape(4, 3), x[1:], x.clone(), x)]
    assert numbers == [0, 0, 1, 2, 3, 4, 5, 0]
    x[0] += 1  # a view's write counts too
    assert tracker.key(x) == 6
    tracker.clear()
    assert tracker.key(x) == 0


def test_tracker_keeps_inputs_alive_so_that_memory_is_not_taken_for_the_same_input():
    tracker = InputTracker()
    assert [tracker.key(torch.ones(64) * index) for index in range(50)] == list(range(50))


def test_tracker_takes_inference_tensors_for_distinct_because_their_writes_are_not_counted():
    tracker = InputTracker()
    with torch.inference_mode():
        x = torch.ones(3)
        first = tracker.key(x)
        x += 1
        assert tracker.key(x) != first


def test_same_input_on_the_meta_device():
    x = torch.ones(2, 3, device="meta")
    assert same_input(x, x.detach())
    assert not same_input(x, torch.ones(2, 3, device="meta"))
