"""What is true of every optimizer, whatever its mathematics."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
from torch import nn

import tiny_models
from eckart import catalog
from eckart.optim import for_trainer, low_rank_groups, optimizer_class

METHODS = [row.name for row in catalog.select(family="optim") if row.status != "planned"]
every = pytest.mark.parametrize("method", METHODS)
either = pytest.mark.parametrize("bits", [32, 8])
RANK = 4
IDS = torch.arange(48).reshape(4, 12) * 7 % 60


def base() -> nn.Module:
    torch.manual_seed(0)
    return tiny_models.FAMILIES["llama"]()


def optimizer(method: str, model: nn.Module, bits: int = 32, **options):
    options = {"lr": 0.01, **options}
    return optimizer_class(method, bits=bits)(low_rank_groups(model, rank=RANK), **options)


def train(model: nn.Module, chosen, steps: int, start: int = 0, rows: int = 4, scheduler=None) -> float:
    loss = torch.zeros(())
    for step in range(start, start + steps):
        batch = (IDS[:rows] + step) % 60
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        chosen.step()
        chosen.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return float(loss.detach())


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def near(one: nn.Module, two: nn.Module, tolerance: float = 1e-4) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in pairs)


@every
@either
def test_the_loss_falls(method, bits):
    model = base()
    chosen = optimizer(method, model, bits)
    losses = [train(model, chosen, 1, start=0) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]


@every
def test_every_parameter_is_trained_except_what_the_method_leaves(method):
    model = base()
    before = copy.deepcopy(model)
    chosen = optimizer(method, model)
    train(model, chosen, 2)
    pairs = zip(model.named_parameters(), before.parameters(), strict=True)
    still = [name for (name, p), q in pairs if torch.equal(p, q)]
    left = {name for name, _ in model.named_parameters()} - set(chosen.projected())
    assert set(still) == (set() if catalog.get(method).load().trains_rest else left)
    assert chosen.projected()
    assert left


@every
@pytest.mark.parametrize("trains_rest", [True, False])
def test_the_rest_is_trained_or_left_as_asked(method, trains_rest):
    model = base()
    before = copy.deepcopy(model)
    chosen = optimizer(method, model, trains_rest=trains_rest)
    train(model, chosen, 2)
    projected = set(chosen.projected())
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q) == (name not in projected and not trains_rest), name


@every
@either
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(method, bits):
    model = base()
    short = {"update_interval": 3, "warmup": 7}  # refreshes on both sides, a warm-up that is interrupted
    options = {name: value for name, value in short.items() if name in catalog.get(method).load().__dataclass_fields__}
    chosen = optimizer(method, model, bits, **options)
    train(model, chosen, 1)
    keys = [sorted(state) for state in chosen.state.values()]
    train(model, chosen, 4, start=1)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": chosen.state_dict()}, file)
    train(model, chosen, 5, start=5)
    assert [sorted(state) for state in chosen.state.values()] == keys

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = base()
    resumed.load_state_dict(saved["model"])
    again = optimizer(method, resumed, bits)
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, 5, start=5)
    assert same(resumed, model)
    for a, b in zip(chosen.state.values(), again.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def _refreshes(method: str) -> bool:
    return "update_interval" in {field.name for field in dataclasses.fields(catalog.get(method).load())}


@every
def test_accumulated_gradients_equal_one_big_batch(method):
    whole, parts = base(), base()
    first, second = optimizer(method, whole), optimizer(method, parts)
    for _ in range(3):
        whole(input_ids=IDS, labels=IDS).loss.backward()
        for half in IDS.split(2):
            (parts(input_ids=half, labels=half).loss / 2).backward()
        for model, chosen in ((whole, first), (parts, second)):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            chosen.step()
            chosen.zero_grad()
    # Where a gradient is rounding only, Adam makes full steps of either sign.
    assert near(whole, parts, 2e-3)


@every
@pytest.mark.parametrize("accumulation", [1, 2])
def test_updates_in_the_backward_pass_give_the_same(method, accumulation):
    plain, fused = base(), base()
    chosen = optimizer(method, plain)
    inside = optimizer(method, fused, fused_backward=True, accumulation=accumulation)
    for step in range(3):
        for _ in range(accumulation):
            batch = (IDS + step) % 60
            plain(input_ids=batch, labels=batch).loss.backward()
            fused(input_ids=batch, labels=batch).loss.backward()
        assert all(p.grad is None for p in fused.parameters())
        inside.step()
        chosen.step()
        chosen.zero_grad()
    assert same(plain, fused)


def test_parameters_that_the_backward_pass_does_not_know_are_not_left_untrained_in_silence():
    """As accelerate does it under FSDP2: other parameters in the groups of an optimizer that is there already."""
    model = base()
    chosen = optimizer("galore", model, fused_backward=True)
    for group in chosen.param_groups:
        group["params"] = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
    chosen.step()  # nothing has a gradient yet
    first = chosen.param_groups[0]["params"][0]
    first.grad = torch.ones_like(first)
    with pytest.raises(RuntimeError, match="make the optimizer after the model is sharded"):
        chosen.step()


@every
def test_a_parameter_without_gradient_waits(method):
    model = base()
    chosen = optimizer(method, model, trains_rest=True)
    train(model, chosen, 1)
    before, layer = copy.deepcopy(model), model.model.layers[0].mlp.up_proj.weight
    count = int(chosen.state[layer]["step"])
    model(input_ids=IDS, labels=IDS).loss.backward()
    layer.grad = None
    chosen.step()
    assert torch.equal(layer, before.model.layers[0].mlp.up_proj.weight)
    assert int(chosen.state[layer]["step"]) == count
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)


@every
def test_groups_schedulers_and_closures(method):
    model, other = base(), base()
    chosen, plain = optimizer(method, model), optimizer(method, other)
    chosen.param_groups[1]["lr"] = 0.0
    schedule = torch.optim.lr_scheduler.LambdaLR(plain, lambda step: 1.0)
    before = copy.deepcopy(model)

    def closure() -> torch.Tensor:
        chosen.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return loss

    assert float(chosen.step(closure).detach()) > 0
    other(input_ids=IDS, labels=IDS).loss.backward()
    plain.step()
    schedule.step()
    dense = {id(p) for p in chosen.param_groups[1]["params"]}
    for p, q, old in zip(model.parameters(), other.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, old if id(p) in dense else q)


@every
def test_half_precision_weights_keep_their_moments_in_single_and_small_updates_with_random_rounding(method):
    model = base().to(torch.bfloat16)
    before = copy.deepcopy(model)
    chosen = optimizer(method, model, lr=1e-5, stochastic_rounding=True, trains_rest=True)
    train(model, chosen, 3)
    weight, old = model.lm_head.weight, before.lm_head.weight
    large = old.abs() > 0.02  # a step of 1e-5 is below half a unit in the last place of these
    assert bool((weight != old)[large].any())
    assert {v.dtype for state in chosen.state.values() for v in state.values() if v.is_floating_point()} == {
        torch.float32
    }
    plain = copy.deepcopy(before)
    train(plain, optimizer(method, plain, lr=1e-5, trains_rest=True), 1)
    assert torch.equal(plain.lm_head.weight[large], old[large])


@every
def test_bad_gradients_change_nothing(method):
    model = base()
    chosen = optimizer(method, model)
    train(model, chosen, 1)
    before, state = copy.deepcopy(model), copy.deepcopy(chosen.state_dict()["state"])

    def untouched() -> bool:
        now = chosen.state_dict()["state"]
        return same(model, before) and all(torch.equal(now[i][k], v) for i, s in state.items() for k, v in s.items())

    model(input_ids=IDS, labels=IDS).loss.backward()
    model.model.layers[1].mlp.up_proj.weight.grad[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"gradient of model\.layers\.1\.mlp\.up_proj\.weight.*nonfinite='skip'"):
        chosen.step()
    assert untouched()
    chosen._nonfinite = "skip"
    chosen.step()
    assert untouched()
    embedding = model.model.embed_tokens.weight
    embedding.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, embedding.shape[1]), embedding.shape)
    with pytest.raises(RuntimeError, match=r"embed_tokens\.weight has a sparse gradient"):
        chosen.step()
    assert untouched()


@every
def test_another_state_is_refused(method):
    model = base()
    chosen = optimizer(method, model)
    train(model, chosen, 1)
    state = copy.deepcopy(chosen.state_dict())
    adam = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="not of"):
        chosen.load_state_dict(adam.state_dict())
    wrong = copy.deepcopy(state)
    key = next(name for name in wrong["state"][0] if name != "step")
    wrong["state"][0][key] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"state of model\.layers\.0\.\S+ has"):
        chosen.load_state_dict(wrong)
    kept = chosen.state_dict()["state"]
    assert all(torch.equal(kept[i][k], v) for i, s in state["state"].items() for k, v in s.items())


@every
def test_bad_options_are_refused(method):
    model = base()
    kind, groups = optimizer_class(method), low_rank_groups(model, rank=RANK)
    with pytest.raises(ValueError, match="has no option 'rnak'"):
        kind(groups, rnak=3)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        kind(model.parameters(), rank=0)
    if _refreshes(method):
        with pytest.raises(ValueError, match="update_interval must be positive"):
            kind(groups, update_interval=0)
    with pytest.raises(ValueError, match="is complex"):
        kind([nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="nonfinite must be"):
        kind(groups, nonfinite="ignore")


@every
def test_it_is_a_frozen_dataclass_of_plain_options(method):
    rule = catalog.get(method).load()
    assert rule.__dataclass_params__.frozen
    assert rule(**dataclasses.asdict(rule())) == rule()


@every
def test_it_trains_in_the_trainer(method, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = base()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=for_trainer(method, model, RANK))
    before = copy.deepcopy(model)
    trainer.train()
    assert not same(model, before)
    assert type(trainer.optimizer.optimizer).__name__ == optimizer_class(method).__name__


def test_groups_tell_matrices_from_the_rest():
    model = base()
    groups = low_rank_groups(model, rank=RANK, weight_decay=0.1)
    names = [[name for name, _ in group["params"]] for group in groups]
    assert all(".layers." in name and name.endswith("proj.weight") for name in names[0])
    assert names[1] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert all("norm" in name for name in names[2])
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert sum(map(len, names)) == len(list(model.parameters()))
    with pytest.warns(UserWarning, match="at most the rank"):
        low_rank_groups(model, rank=16)
    with pytest.raises(ValueError, match="no trainable matrix"):
        low_rank_groups(model, rank=10_000)
    with pytest.raises(ValueError, match="at least 1"):
        low_rank_groups(model, rank=0)
