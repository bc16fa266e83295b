"""The pass through the pretrained model: it is that, and leaves nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import DynamicCache

import tiny_models
from eckart.adapters import EckartConfig
from eckart.adapters.coordinator import Coordinator
from eckart.adapters.pissa import PiSSA
from eckart.adapters.reference import reference_output

IDS = torch.arange(24).reshape(2, 12) % 60


class _Noisy(nn.Module):
    """Everything that differs between training and evaluation, and a head that is trained whole."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.inner = nn.Linear(6, 8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)
        self.calls: list[dict] = []
        self.fails = False

    def forward(self, x, labels=None):
        self.calls.append({"training": self.training, "labels": labels, "gradients": torch.is_grad_enabled()})
        if self.fails and not self.training:
            raise OverflowError("on purpose")
        return {"logits": self.head(self.drop(self.inner(self.norm(x))))}


class _Asks(Coordinator):
    counts_steps = False
    needs_reference = True

    def __init__(self, adapters, seed):
        super().__init__(adapters, seed)
        self.seen: list[dict] = []

    def observe_reference(self, output):
        self.seen.append(output)


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def asking(monkeypatch):
    monkeypatch.setattr(PiSSA, "coordinate", lambda self, adapters, seed: _Asks(adapters, seed))


def noisy():
    torch.manual_seed(0)
    base = _Noisy()
    config = EckartConfig(method="pissa", r=2, target_modules=["inner"], modules_to_save=["head"])
    expected = copy.deepcopy(base).eval()(X)["logits"].detach()
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.5)
    model.train()
    base.norm.eval()  # a mode of its own, as users freeze batch norms
    base.calls.clear()
    return model, base, expected


def state(model):
    return (
        {name: (module.training, getattr(module, "_disable_adapters", None)) for name, module in model.named_modules()},
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
    )


def same(before, after):
    return (
        before[0] == after[0]
        and before[2] == after[2]
        and before[1].keys() == after[1].keys()
        and all(torch.equal(value, after[1][name]) for name, value in before[1].items())
    )


@pytest.mark.usefixtures("asking")
def test_it_is_the_pretrained_model_and_leaves_nothing_behind():
    model, base, expected = noisy()
    base.norm.train()
    before = state(model)
    torch.manual_seed(1)
    output = model(X, labels=torch.zeros(7))["logits"]
    (seen,) = model.base_model.coordinators()["default"].seen
    assert torch.equal(seen["logits"], expected)
    assert not seen["logits"].requires_grad
    assert [call["training"] for call in base.calls] == [False, True]
    assert [call["gradients"] for call in base.calls] == [False, True]
    assert base.calls[0]["labels"] is None
    assert base.calls[1]["labels"] is not None
    after = state(model)
    for name in ("running_mean", "running_var", "num_batches_tracked"):  # of the training pass alone
        key = f"base_model.model.norm.{name}"
        assert not torch.equal(before[1].pop(key), after[1].pop(key))
    assert int(base.norm.num_batches_tracked) == 1
    assert same(before, after)
    # Nor is a draw of the dropout used up.
    model.base_model.coordinators()["default"].needs_reference = False
    torch.manual_seed(1)
    assert torch.equal(model(X)["logits"], output)
    assert len(base.calls) == 3


@pytest.mark.usefixtures("asking")
def test_it_is_made_only_in_training_with_gradients():
    model, base, _ = noisy()
    model.eval()
    model(X)
    model.train()
    with torch.no_grad():
        model(X)
    assert len(base.calls) == 2
    assert model.base_model.coordinators()["default"].seen == []
    model.add_adapter("other", EckartConfig(method="sorsa", r=2, target_modules=["inner"]))
    model.set_adapter("other")  # one that does not ask
    model.train()
    model(X)
    assert len(base.calls) == 3


@pytest.mark.usefixtures("asking")
def test_the_model_is_put_back_after_an_error():
    model, base, _ = noisy()
    before = state(model)
    base.fails = True
    with pytest.raises(OverflowError, match="on purpose"):
        model(X)
    assert same(before, state(model))
    base.fails = False
    assert model(X)["logits"].requires_grad


@pytest.mark.usefixtures("asking")
def test_what_would_spoil_it_is_refused():
    model, base, _ = noisy()
    base.eval()
    model.merge_adapter()
    model.train()
    with pytest.raises(ValueError, match=r"unmerge_adapter\(\) first"):
        model(X)
    llama = get_peft_model(tiny_models.FAMILIES["llama"](), EckartConfig(method="pissa", r=2)).train()
    cache = DynamicCache(config=llama.config)
    with pytest.raises(ValueError, match="would write into past_key_values"):
        llama(input_ids=IDS, past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.usefixtures("asking")
def test_an_encoder_decoder_keeps_its_labels():
    base = tiny_models.FAMILIES["t5"]().eval()
    with torch.no_grad():
        expected = base(input_ids=IDS, labels=IDS).logits
    model = get_peft_model(base, EckartConfig(method="pissa", r=2, target_modules=["q", "v"])).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    (seen,) = model.base_model.coordinators()["default"].seen
    assert torch.equal(seen.logits, expected)


def test_autocast_does_not_keep_weights_that_have_lost_their_gradient(monkeypatch):
    """A weight that the user trains too would be rounded once for both passes, without gradients, in torch 2.9."""
    cleared, clear = [], torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (cleared.append(torch.is_grad_enabled()), clear()))
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reference_output(layer, (X,), {})
        assert cleared == [True]
        layer(X).sum().backward()
    assert layer.weight.grad.any()
