"""AdaLoRA against its equations in NumPy, and its budget on a model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

import tiny_models
from eckart.adapters import EckartConfig
from eckart.adapters.adalora import AdaLoRA, budget
from eckart.adapters.callback import EckartCallback
from eckart.adapters.site import Site

IDS = torch.arange(24).reshape(2, 12) % 60


def adapters(method: AdaLoRA, rank: int = 3) -> dict:
    made = {}
    for index, (rows, columns) in enumerate(((12, 10), (8, 12), (10, 10))):
        adapter = method.build(Site(f"layer{index}", "linear", rows, columns), rank, 1.0)
        adapter.initialize(torch.zeros(rows, columns), None, torch.Generator().manual_seed(index))
        made[f"layer{index}"] = adapter
    return made


def adapted(**options) -> PeftModel:
    config = EckartConfig(method="adalora", r=3, options=options, task_type="CAUSAL_LM")
    return get_peft_model(tiny_models.FAMILIES["llama"]().eval(), config)


def step(model: PeftModel, optimizer: torch.optim.Optimizer, number: int, total: int) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.base_model.on_step(number, total)
    optimizer.zero_grad()


def test_the_budget_falls_from_first_to_last():
    values = [budget(t, 100, first=24, last=8, begin=20, end=30) for t in range(1, 101)]
    assert values[:20] == [24] * 20
    assert values[69:] == [8] * 31
    assert all(a >= b for a, b in itertools.pairwise(values))
    # At half of the middle the cubic leaves an eighth of the difference.
    assert values[44] == 8 + (24 - 8) // 8


def test_the_start_and_the_formula():
    adapter = AdaLoRA().build(Site("layer", "linear", 12, 10), 3, 0.5)
    weight = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    adapter.initialize(weight, None, torch.Generator().manual_seed(0))
    assert torch.equal(adapter.delta(weight), torch.zeros(12, 10))
    assert adapter.num_trainable() == AdaLoRA().trainable(adapter.site, 3) == 3 * (12 + 10 + 1)
    adapter.core.data = torch.tensor([1.0, -2.0, 0.5])
    p, q = adapter.left.detach().double().numpy(), adapter.right.detach().double().numpy()
    expected = 0.5 * p @ np.diag([1.0, -2.0, 0.5]) @ q
    assert np.abs(adapter.delta(weight).detach().numpy() - expected).max() < 1e-7
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    base = nn.Linear(10, 12)
    assert torch.allclose(adapter(x, base), base(x) + x @ torch.tensor(expected.T, dtype=torch.float32), atol=1e-6)


@pytest.mark.parametrize("squared", [True, False])
def test_the_penalty(squared):
    method = AdaLoRA(orthogonality=0.3, squared=squared)
    made = adapters(method)
    terms = []
    for adapter in made.values():
        p, q = adapter.left.detach().double().numpy(), adapter.right.detach().double().numpy()
        for gram in (p.T @ p, q @ q.T):
            norm = np.linalg.norm(gram - np.eye(3))
            terms.append(norm**2 if squared else norm)
    assert abs(float(method.coordinate(made, 0).penalty().detach()) - 0.3 * np.mean(terms)) < 1e-6
    assert AdaLoRA(orthogonality=0).coordinate(made, 0).penalty() is None


def test_scores_and_masks_are_those_of_the_equations():
    method = AdaLoRA(target=4 / 9, begin=0.0, end=0.25, every=1, beta1=0.7, beta2=0.6)
    made = adapters(method)
    coordinator = method.coordinate(made, seed=0)
    generator = torch.Generator().manual_seed(5)
    mean: dict[str, np.ndarray] = {}
    spread: dict[str, np.ndarray] = {}
    total = 8
    for number in range(1, total + 1):
        for name, adapter in made.items():
            for part, parameter in adapter.named_parameters():
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                if number < 6:  # the scores are settled for the last quarter
                    key = f"{name}.{part}"
                    importance = np.abs(parameter.detach().double().numpy() * parameter.grad.double().numpy())
                    mean[key] = 0.7 * mean.get(key, 0 * importance) + 0.3 * importance
                    spread[key] = 0.6 * spread.get(key, 0 * importance) + 0.4 * np.abs(importance - mean[key])
        with torch.no_grad():
            coordinator.on_step(number, total)
        scores = []
        for name in made:
            s = {part: mean[f"{name}.{part}"] * spread[f"{name}.{part}"] for part in ("left", "core", "right")}
            scores.append(s["core"] + s["left"].mean(axis=0) + s["right"].mean(axis=1))
        keep = budget(number, total, first=9, last=4, begin=0, end=2)
        wanted = np.zeros(9)
        wanted[np.argsort(-np.concatenate(scores), kind="stable")[:keep]] = 1
        found = torch.cat([adapter.kept for adapter in made.values()]).numpy()
        assert (found == wanted).all(), number
        assert all((adapter.core[adapter.kept == 0] == 0).all() for adapter in made.values())


def test_equal_scores_leave_exactly_the_budget():
    method = AdaLoRA(target=1 / 3, begin=0.0, end=0.5)
    made = adapters(method)
    coordinator = method.coordinate(made, seed=0)
    with torch.no_grad():
        coordinator.on_step(1, 2)  # no gradients at all: every score is zero
    assert sum(adapter.settled_rank() for adapter in made.values()) == 3


def test_ranks_move_the_budget_is_met_and_empty_layers_are_saved(tmp_path):
    model = adapted(target=1 / 3, begin=0.1, end=0.2).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for number in range(1, 21):
        step(model, optimizer, number, 20)
    ranks = [adapter.settled_rank() for adapter in model.base_model.coordinators()["default"].members.values()]
    assert sum(ranks) == len(ranks)  # one of three each, on average
    assert min(ranks) == 0
    assert max(ranks) > 1
    for adapter, rank in zip(model.base_model.coordinators()["default"].members.values(), ranks, strict=True):
        assert adapter.low_rank()[0].shape[1] == rank
        assert torch.linalg.matrix_rank(adapter.delta(torch.zeros(1))) <= rank
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_models.FAMILIES["llama"]().eval(), tmp_path).eval()
        assert torch.equal(loaded(input_ids=IDS).logits, expected)
        merged = model.merge_and_unload()
        assert torch.allclose(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=2e-5)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    rows = [{"input_ids": IDS[i % 2].tolist(), "labels": IDS[i % 2].tolist()} for i in range(8)]
    sizes = {"per_device_train_batch_size": 2, "save_steps": 4, "report_to": "none", "learning_rate": 1e-2}

    def train(directory: str, resume: bool) -> dict[str, torch.Tensor]:
        model = adapted(target=1 / 3, begin=0.0, end=0.3)
        arguments = TrainingArguments(output_dir=str(tmp_path / directory), max_steps=8, disable_tqdm=True, **sizes)
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[EckartCallback()])
        trainer.train(resume_from_checkpoint=str(tmp_path / directory / "checkpoint-4") if resume else None)
        return load_file(tmp_path / directory / "checkpoint-8" / "adapter_model.safetensors")

    whole = train("run", resume=False)
    again = train("run", resume=True)
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0}, "target must be a share"),
        ({"begin": 0.6, "end": 0.5}, "begin and end must be shares"),
        ({"every": 0}, "every must be at least 1"),
        ({"beta2": 1.0}, "beta2 must be at least 0 and below 1"),
        ({"orthogonality": -1}, "orthogonality must be a number of at least 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        AdaLoRA(**options)


@pytest.mark.parametrize("shares", [(0.95, 0.05, 5), (0.96, 0.04, 10), (0.9, 0.1, 3), (1.0, 1e-6, 7)])
def test_the_last_step_is_at_the_end_budget_however_shares_are_rounded(shares):
    begin, end, total = shares
    assert budget(total, total, 12, 8, round(begin * total), max(1, round(end * total))) == 8


def test_between_two_masks_the_update_is_what_the_layer_computes():
    method = AdaLoRA(every=5, begin=0.0, end=0.1, target=0.5)
    made = adapters(method)
    coordinator = method.coordinate(made, 0)
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(4, adapter.site.in_features, generator=generator) for name, adapter in made.items()}
    revived = 0
    for number in range(1, 14):
        with torch.no_grad():
            for adapter in made.values():
                for p in adapter.parameters():
                    p.grad = torch.randn(p.shape, generator=generator)
                    p -= 0.1 * p.grad
            coordinator.on_step(number, 20)
        for name, adapter in made.items():
            revived += int(((adapter.kept == 0) & (adapter.core != 0)).sum())
            added, delta = adapter.update(x[name]), adapter.delta(torch.zeros(1))
            assert torch.allclose(added, x[name] @ delta.mT, atol=1e-5)
    assert revived  # otherwise nothing was tested


def test_the_penalty_has_a_gradient_where_nothing_is_left_to_correct():
    method = AdaLoRA(squared=False)
    adapter = method.build(Site("layer", "linear", 4, 4), 2, 1.0)
    adapter.fill(left=torch.eye(4)[:, :2], right=torch.eye(4)[:2])
    method.coordinate({"layer": adapter}, 0).penalty().backward()
    assert not adapter.left.grad.any()
    assert not adapter.right.grad.any()
