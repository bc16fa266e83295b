"""What lets adapters act together: shared tensors, counted steps, state in the Trainer's checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import tiny_models
from eckart import catalog
from eckart.adapters import EckartConfig
from eckart.adapters.callback import EckartCallback
from eckart.adapters.contract import AdapterMethod
from eckart.adapters.coordinator import Coordinator
from eckart.adapters.factored import FactoredAdapter
from eckart.catalog import Method

IDS = torch.arange(24).reshape(2, 12) % 60


class _Log(Coordinator):
    def __init__(self, adapters, seed):
        super().__init__(adapters, seed)
        self.state["steps"] = torch.zeros(1)
        self.losses: list[float] = []
        self.forwards: list[bool] = []
        self.gradients: list[bool] = []

    def before_forward(self, kwargs, training):
        self.forwards.append(training)

    def observe(self, loss):
        self.losses.append(float(loss))

    def penalty(self):
        first = next(iter(self.adapters.values()))
        return first.left.square().sum() * 0 + 1.0

    def on_step(self, step, total):
        self.state["steps"] = self.state["steps"] + 1
        self.gradients.append(any(p.grad is not None for a in self.adapters.values() for p in a.parameters()))


class _Pair(FactoredAdapter):
    def __init__(self, site, rank, scale):
        super().__init__(site, rank, trained=("left", "right"), scale=scale)

    def initialize(self, weight, statistics, generator):
        # A tensor that is shared is its owner's to fill.
        self.fill(left=torch.zeros(self.site.out_features, self.rank))
        if "right" in dict(self.named_parameters()):
            self.fill(right=torch.randn(self.rank, self.site.in_features, generator=generator))


@dataclass(frozen=True)
class _Tied(AdapterMethod):
    def build(self, site, rank, scale):
        return _Pair(site, rank, scale)

    def trainable(self, site, rank):
        return rank * (site.in_features + site.out_features)

    def link(self, adapters):
        owners: dict[int, _Pair] = {}
        for adapter in adapters.values():
            owner = owners.setdefault(adapter.site.in_features, adapter)
            if owner is not adapter:
                adapter.share(owner, "right")

    def total_trainable(self, sites, ranks):
        rank = next(iter(ranks.values()))
        return rank * (sum(s.out_features for s in sites.values()) + sum({s.in_features for s in sites.values()}))

    def coordinate(self, adapters, seed):
        return _Log(adapters, seed)


@pytest.fixture(autouse=True)
def tied(monkeypatch):
    """The method above under a name of the catalog, for the test's time."""
    row = catalog.get("pissa", family="adapters")
    monkeypatch.setattr(Method, "load", lambda self: _Tied if self.name == row.name else None)


def adapted() -> PeftModel:
    config = EckartConfig(method="pissa", r=3, task_type="CAUSAL_LM")
    return get_peft_model(tiny_models.FAMILIES["llama"]().eval(), config)


def log(model: PeftModel) -> _Log:
    return model.base_model.coordinators()["default"]


def step(model: PeftModel, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def sgd(model: PeftModel) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def test_a_shared_tensor_is_one_parameter_with_one_gradient_and_is_saved_once(tmp_path):
    model = adapted()
    adapters = log(model).adapters
    rights = {id(adapter.right) for adapter in adapters.values()}
    assert len(rights) == len({adapter.site.in_features for adapter in adapters.values()})
    names = [name for name, _ in model.named_parameters() if name.endswith(".right")]
    assert len(names) == len(rights)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(key.endswith(".right") for key in saved) == len(rights)
    for low_memory in (False, True):
        base = tiny_models.FAMILIES["llama"]().eval()
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory).eval()
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=IDS).logits, expected)


def test_a_loop_that_counts_steps_is_told_everything_in_order():
    model = adapted().train()
    optimizer = sgd(model)
    plain = []
    for number in (1, 2):
        plain.append(step(model, optimizer))
        model.base_model.on_step(number, 2)
        optimizer.zero_grad()
    seen = log(model)
    assert seen.gradients == [True, True]
    assert seen.forwards == [True, True]
    # What is observed is the loss without the penalty of one.
    assert [round(float(a) - b, 4) for a, b in zip(plain, seen.losses, strict=True)] == [1.0, 1.0]
    assert float(seen.state["steps"]) == 2


def test_a_loop_that_forgets_is_stopped_at_its_second_step():
    model = adapted().train()
    optimizer = sgd(model)
    step(model, optimizer)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"call model\.base_model\.on_step"):
        model(input_ids=IDS, labels=IDS)
    model.eval()
    model(input_ids=IDS)  # using it is no training


def test_accumulating_gradients_is_not_taken_for_forgetting():
    model = adapted().train()
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()


def test_draws_depend_on_seed_and_step_only():
    one, two = Coordinator({}, seed=1), Coordinator({}, seed=1)
    a, b = (torch.randn(4, generator=c.generator(7)) for c in (one, two))
    assert torch.equal(a, b)
    assert not torch.equal(a, torch.randn(4, generator=one.generator(8)))
    assert not torch.equal(a, torch.randn(4, generator=Coordinator({}, seed=2).generator(7)))


def test_the_trainer_counts_steps_and_keeps_the_state(tmp_path):
    rows = [{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}] * 8
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "save_steps": 2, "report_to": "none"}

    def train(steps: int, resume: bool) -> tuple[PeftModel, Path]:
        model = adapted()
        arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=steps, disable_tqdm=True, **sizes)
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[EckartCallback()])
        trainer.train(resume_from_checkpoint=resume or None)
        return model, tmp_path

    first, _ = train(2, resume=False)
    assert log(first).gradients == [True, True]
    assert float(load_file(tmp_path / "checkpoint-2" / "eckart_state_default.safetensors")["steps"]) == 2
    second, _ = train(4, resume=True)
    assert len(log(second).gradients) == 2
    assert float(log(second).state["steps"]) == 4


def test_a_method_without_nested_ranks_cannot_be_truncated():
    model = adapted()
    with pytest.raises(ValueError, match="only a method that trains nested ranks"):
        model.base_model.truncate(2)
    with pytest.raises(ValueError, match="rank must be 1 to 3, not 4"):
        model.base_model.truncate(4)
    with pytest.raises(ValueError, match="no adapter 'other'; there is default"):
        model.base_model.truncate(2, "other")


def test_without_the_adapter_nothing_is_driven():
    model = adapted().train()
    model.delete_adapter("default")
    assert model.base_model.coordinators() == {}
    model = adapted().train()
    base = model.unload()
    base.train()
    for _ in range(2):
        base(input_ids=IDS, labels=IDS)
