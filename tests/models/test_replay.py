from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from eckart.models import blocks, calibrate, linears
from eckart.models.calibrate import input_order
from eckart.models.replay import Replay

EVERY_FAMILY = pytest.mark.parametrize("family", tiny_models.FAMILIES)


def batches(model: nn.Module) -> list[dict[str, Tensor]]:
    first, second = tiny_models.inputs(model, 2, 9), tiny_models.inputs(model, 3, 12)
    if "attention_mask" in first:
        first["attention_mask"][0, 6:] = 0
    return [first, second]


@torch.no_grad()
def states_by_hooks(model: nn.Module, data: list[dict[str, Tensor]]) -> list[list[tuple[Tensor, Tensor]]]:
    """For every block and batch, the hidden state before and after it, from an ordinary forward pass."""
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in blocks(model)]
    handles = []
    for index, block in enumerate(blocks(model)):

        def see(_, args, kwargs, output, index=index):
            state = args[0] if args else next(iter(kwargs.values()))
            found[index].append((state.clone(), (output[0] if isinstance(output, tuple) else output).clone()))

        handles.append(block.module.register_forward_hook(see, with_kwargs=True))
    for batch in data:
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


@EVERY_FAMILY
def test_block_by_block_equals_the_forward_of_the_model(family):
    model = tiny_models.FAMILIES[family]()
    data = batches(model)
    truth = states_by_hooks(model, data)
    replay, hidden = Replay(model, blocks(model), data), None
    for index, states in enumerate(truth):
        hidden = replay.enter(index, hidden)
        for given, (before, _) in zip(hidden, states, strict=True):
            assert torch.equal(given, before)
        hidden = replay.advance(index, hidden)
        for given, (_, after) in zip(hidden, states, strict=True):
            assert torch.equal(given, after)
    assert not any("forward" in module.__dict__ for module in model.modules())


@EVERY_FAMILY
def test_a_stand_in_runs_in_the_place_of_its_block(family):
    model = tiny_models.FAMILIES[family]()
    data = batches(model)
    truth = states_by_hooks(model, data)
    originals = [copy.deepcopy(block.module) for block in blocks(model)]
    replay, hidden = Replay(model, blocks(model), data), None
    for index, block in enumerate(blocks(model)):
        with torch.no_grad():
            for parameter in block.module.parameters():
                parameter.mul_(0.5)
        hidden = replay.advance(index, replay.enter(index, hidden), originals[index])
        for given, (_, after) in zip(hidden, truth[index], strict=True):
            assert torch.equal(given, after)


def test_hooks_see_inputs_and_can_end_the_pass():
    model = tiny_models.FAMILIES["llama"]()
    data = batches(model)
    replay = Replay(model, blocks(model), data)
    block = model.model.layers[0]
    seen: list[tuple[str, Tensor, int]] = []

    def see(name, stop):
        return lambda x, call: seen.append((name, x, call.batch)) or stop

    (first, second) = replay.first_hidden()
    hooks = {block.self_attn.q_proj: see("q", False), block.self_attn.o_proj: see("o", True)}
    hooks[block.mlp.down_proj] = see("down", False)
    assert replay.run(0, 1, second, hooks) is None
    assert [(name, batch) for name, _, batch in seen] == [("q", 1), ("o", 1)]
    assert torch.equal(seen[0][1], block.input_layernorm(second))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match=r"the forward of model\.layers\.0 ended early"):
        replay.advance_one(0, 0, first, hooks)


def test_what_enters_the_first_block_can_be_chosen():
    model = tiny_models.FAMILIES["llama"]()
    replay = Replay(model, blocks(model), [tiny_models.inputs(model)])
    (state,) = replay.first_hidden()
    assert not torch.equal(replay.run(0, 0, state * 2), replay.run(0, 0, state))


def test_the_mask_of_cross_attention_is_the_encoders():
    model = tiny_models.FAMILIES["t5"]()
    batch = tiny_models.inputs(model, 2, 8)
    batch["attention_mask"][0, 5:] = 0
    batch["decoder_attention_mask"] = torch.ones_like(batch["decoder_input_ids"])
    batch["decoder_attention_mask"][1, 2:] = 0
    found = calibrate(model, [batch], progress=False)
    counts = {name.partition("block.0.")[2]: entry.count for name, entry in found.items() if "decoder.block.0" in name}
    tokens, own = int(batch["attention_mask"].sum()), int(batch["decoder_attention_mask"].sum())
    assert {name for name, count in counts.items() if count == tokens} == {
        "layer.1.EncDecAttention.k",
        "layer.1.EncDecAttention.v",
    }
    assert set(counts.values()) == {tokens, own}


def test_labels_are_enough_for_a_decoder_and_say_what_is_padding():
    model = tiny_models.FAMILIES["t5"]()
    batch = tiny_models.inputs(model, 2, 8)
    labels = batch.pop("decoder_input_ids").clone()
    labels[0, 1:] = -100
    found = calibrate(model, [{**batch, "labels": labels}], progress=False)
    assert found["decoder.block.0.layer.0.SelfAttention.q"].count == int((labels != -100).sum())
    assert found["encoder.block.0.layer.0.SelfAttention.q"].count == batch["input_ids"].numel()


# --------------------------------------------------------------------- forms that the families above do not have


class Layer(nn.Module):
    """A block whose state goes by another name, and which returns more than it."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, *, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return x + torch.tanh(self.linear(x)) * scale, scale * 0.5


class Experts(nn.Module):
    """A block that sends each token to one of its experts, as (tokens, n)."""

    def __init__(self, width: int = 6, count: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(width, count)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        chosen, out = self.router(flat).argmax(-1), torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            mine = chosen == index
            if mine.any():
                out[mine] = expert(flat[mine])
        return x + out.reshape(x.shape)


class Towers(nn.Module):
    """Images, if there are any, and then text; something happens between the text blocks, too."""

    def __init__(self, text: Sequence[nn.Module], images: Sequence[nn.Module]) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=False)
        self.embedding = nn.Embedding(16, 6)
        self.vision = nn.ModuleList(images)
        self.layers = nn.ModuleList(text)

    def forward(self, input_ids: Tensor, pixels: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        if pixels is not None:
            for layer in self.vision:
                pixels = layer(pixels)
            x = x + pixels.mean(1, keepdim=True)
        scale = torch.ones(())
        for layer in self.layers:
            if isinstance(layer, Layer):
                x, scale = layer(x=x, scale=scale)
            else:
                x = layer(x)
            x = x * 1.5
        return x


def towers(text: Sequence[nn.Module], images: Sequence[nn.Module] = ()) -> Towers:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Towers(text, images)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    return model.eval().double()


def random_ids(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(16, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def grams_by_hooks(model: nn.Module, data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def see(name, x):
        x = x.reshape(-1, x.shape[-1])
        found[name] = found.get(name, 0) + x.T @ x

    handles = [
        ref.module.register_forward_pre_hook(lambda _, args, name=ref.name: see(name, args[0]))
        for ref in linears(model).linears
    ]
    for batch in data:
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def assert_grams_equal(model: nn.Module, data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    truth = grams_by_hooks(model, data)
    found = calibrate(model, data, progress=False)
    assert found.keys() == truth.keys()
    for name, gram in truth.items():
        torch.testing.assert_close(found[name].gram, gram, rtol=1e-12, atol=1e-12)
    return truth


def test_a_state_by_another_name_a_tuple_and_work_between_blocks():
    model = towers([Layer(), Layer(), Layer()])
    assert_grams_equal(model, [{"input_ids": random_ids(2, 5)}, {"input_ids": random_ids(3, 4, 1)}])


def test_experts_get_their_own_tokens():
    model = towers([Experts(), Experts()])
    data = [{"input_ids": random_ids(1, 3)}, {"input_ids": random_ids(4, 8, 1)}]
    truth = assert_grams_equal(model, data)
    assert len(truth) == 8, "every expert must have seen a token, or this tests nothing"


def test_an_expert_without_tokens_has_no_statistics():
    model = towers([Experts()])
    with torch.no_grad():
        model.layers[0].router.bias[1] = -1e3
    found = calibrate(model, [{"input_ids": random_ids(4, 8)}], progress=False)
    assert sorted(found) == ["layers.0.experts.0", "layers.0.experts.2", "layers.0.router"]


def test_the_order_of_inputs_looks_beyond_the_first_batch():
    model = towers([Experts()])
    data = [{"input_ids": random_ids(1, 1)}, {"input_ids": random_ids(4, 8, 1)}]
    replay = Replay(model, blocks(model), data)
    members = linears(model).linears
    groups = input_order(replay, 0, replay.first_hidden(), members)
    assert groups[0][0].name == "layers.0.router"
    assert sorted(ref.name for group in groups for ref in group) == sorted(ref.name for ref in members)
    assert all(len(group) == 1 for group in groups)


def test_blocks_that_a_batch_does_not_reach():
    """Text alone, text with images, and images that no batch has."""
    model = towers([Layer(), Layer()], [Experts(), Experts()])
    text = {"input_ids": random_ids(2, 5)}
    image = {"pixels": torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    assert_grams_equal(model, [text, {**text, **image}, text])
    found = assert_grams_equal(model, [text])
    assert sorted(found) == ["layers.0.linear", "layers.1.linear"]


def test_a_state_is_not_changed_by_what_the_model_does_to_it_in_place():
    class InPlace(Towers):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            for layer in self.layers:
                x = layer(x)
                x += 1
            return x

    model = towers([Experts(), Experts(), Experts()])
    model.__class__ = InPlace
    data = [{"input_ids": random_ids(2, 5)}, {"input_ids": random_ids(2, 6, 1)}]
    assert_grams_equal(model, data)
    replay = Replay(model, blocks(model), data)
    hidden = replay.advance(0, replay.first_hidden())
    assert torch.equal(replay.run(1, 0, hidden[0]), replay.run(1, 0, hidden[0]))
