"""Recovery: what is trained, that it helps, that everything else stays."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch

import tiny_models
from eckart import adapt
from eckart.compression import compress
from eckart.compression.recover import recover
from eckart.structures import EckartWarning, Structure


@pytest.fixture
def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(60, (24, 1), generator=generator)
    return [(starts + torch.arange(16)) % 60 + 1]  # what comes next can be learnt


def compressed(data: list[torch.Tensor], form: str = "pivoted"):
    model = tiny_models.FAMILIES["llama"]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        compress(model, "svd", ratio=0.5, form=form, progress=False)
    return model


@pytest.mark.parametrize("train", ["factors", "sequential"])
@pytest.mark.parametrize("form", ["pivoted", "plain"])
def test_the_held_out_loss_falls_and_only_the_small_weights_change(data, train, form):
    model = compressed(data, form)
    before = copy.deepcopy(model.state_dict())
    done = recover(model, data, 12, train=train, learning_rate=1e-2, progress=False)
    assert done.loss_after < done.loss_before - 0.05
    assert done.steps == len(done.history) == 12
    structured = {name for name, module in model.named_modules() if isinstance(module, Structure)}
    for name, value in model.state_dict().items():
        inside = name.rpartition(".")[0] in structured
        norm = "norm" in name
        if not inside and not (norm and train == "factors"):
            assert torch.equal(value, before[name]), name
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert {name.rpartition(".")[0] for name in changed} >= structured


def test_sequential_trains_one_factor_after_the_other(data):
    model = compressed(data, "plain")
    before = copy.deepcopy(model.state_dict())
    recover(model, data, 2, train="sequential", progress=False)
    for name in before:
        if "transposed" in name:
            assert not torch.equal(before[name], model.state_dict()[name]), name
    # Of two steps, each factor has one: the first one's gradients are those of the model as it was.
    assert all(p.grad is None for p in model.parameters())


def adapted(data, method: str = "lora"):
    return adapt(compressed(data), method, rank=4, progress=False)


@pytest.mark.parametrize("method", ["lora", "pissa", "sorsa", "adalora", "dylora", "lamda", "loldu"])
def test_an_adapter_learns_and_everything_under_it_stays(data, method):
    """With penalties (sorsa), budgets, draws and schedules that count the steps (adalora, dylora, lamda) among them."""
    model = adapted(data, method)
    before = copy.deepcopy(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    done = recover(model, data, 40, train="adapter", learning_rate=2e-2, progress=False)
    assert done.loss_after < done.loss_before - 0.02
    assert done.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("eckart_adapters" in name for name in changed)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_an_adapter_takes_the_steps_that_a_plain_loop_takes(data):
    """AdamW with the warm-up and the cosine written out, on the same batches."""
    model, twin = adapted(data), adapted(data)
    done = recover(model, data, 5, train="adapter", learning_rate=1e-2, held_out=data, seed=3, progress=False)
    trained = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, weight_decay=0.0, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(3)
    for step in range(5):
        rate = 1.0 if step == 0 else 0.1 + 0.45 * (1 + math.cos(math.pi * step / 5))
        optimizer.param_groups[0]["lr"] = 1e-2 * rate
        ids = data[0][torch.randint(len(data[0]), (4,), generator=generator)]
        loss = twin(ids, labels=ids).loss
        loss.backward()
        assert done.history[step] == pytest.approx(float(loss.detach()), rel=1e-5)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def predictions(model, ids):
    with torch.no_grad():
        return model(ids).logits[:, :-1].double().log_softmax(dim=-1)


def test_a_teachers_predictions_are_learnt_and_it_stays_as_it_is(data):
    """The first loss is KL(teacher || student) written out, over the tokens that count; and it falls."""
    teacher, model = tiny_models.FAMILIES["llama"]().train(), compressed(data)
    kept = copy.deepcopy(teacher.state_dict())
    drawn = torch.randint(len(data[0]), (4,), generator=torch.Generator().manual_seed(0))
    labels = data[0].clone()
    labels[:, :8] = -100
    theirs, ours = (predictions(m.eval(), data[0][drawn])[:, 7:] for m in (copy.deepcopy(teacher), model))
    apart = (theirs.exp() * (theirs - ours)).sum(dim=-1).mean()
    batch = {"input_ids": data[0], "labels": labels}
    done = recover(model, [batch], 60, teacher=teacher, learning_rate=1e-2, held_out=[batch], progress=False)
    assert done.history[0] == pytest.approx(float(apart), rel=3e-2)  # in bfloat16
    assert done.history[-1] < 0.7 * done.history[0]
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())
    assert teacher.training
    assert all(p.grad is None for p in teacher.parameters())


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(data):
    """No step moves the adapter of a model whose teacher is a copy of it; and the model itself is refused."""
    model = adapted(data)
    before = copy.deepcopy(model.state_dict())
    done = recover(model, data, 3, train="adapter", teacher=copy.deepcopy(model), progress=False)
    assert max(done.history) < 1e-6
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="teacher is the compressed model itself"):
        recover(model, data, 3, train="adapter", teacher=model, progress=False)


def test_gradients_are_asked_for_as_before_even_after_a_failure(data):
    model = compressed(data)
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    recover(model, data, 1, progress=False)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    with pytest.raises(ValueError, match="lower learning_rate"):
        recover(model, data, 30, learning_rate=1e30, progress=False)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked


def test_the_same_seed_gives_the_same_weights_and_another_other_ones(data):
    results = []
    for seed in (0, 0, 1):
        model = compressed(data)
        recover(model, data, 3, seed=seed, progress=False)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_padding_is_not_learnt(data):
    plain, padded = compressed(data), compressed(data)
    ids = data[0]
    wider = torch.cat([ids, torch.full((len(ids), 3), 5)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(len(ids), 3, dtype=torch.long)], 1)
    one = recover(plain, [{"input_ids": ids}], 2, progress=False)
    other = recover(padded, [{"input_ids": wider, "attention_mask": mask}], 2, progress=False)
    assert other.history == pytest.approx(one.history, rel=2e-2)  # bfloat16 products of other shapes
    assert other.loss_before == pytest.approx(one.loss_before, rel=1e-5)


def test_time_is_kept_to(data):
    done = recover(compressed(data), data, 10_000, max_seconds=0.5, progress=False)
    assert 0 < done.steps < 10_000
    assert done.seconds < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": "lora"}, "train must be one of factors, sequential, adapter"),
        ({"train": "adapter"}, "needs an adapter that can be trained; put one on with eckart.adapt"),
        ({"steps": 0}, "at least 1"),
        ({"learning_rate": 0.0}, "learning_rate positive"),
    ],
)
def test_bad_arguments(data, arguments, message):
    with pytest.raises(ValueError, match=message):
        recover(compressed(data), data, **({"steps": 2, "progress": False} | arguments))


def test_a_dense_model_is_refused(data):
    with pytest.raises(ValueError, match="no layer of LlamaForCausalLM is structured; compress it first"):
        recover(tiny_models.FAMILIES["llama"](), data, 2, progress=False)


def test_one_sequence_is_not_enough(data):
    with pytest.raises(ValueError, match="two sequences or more"):
        recover(compressed(data), [data[0][:1]], 2, progress=False)


def test_worse_is_said(data):
    model = compressed(data)
    recover(model, data, 30, learning_rate=1e-2, progress=False)
    noise = [torch.randint(1, 60, (16, 16), generator=torch.Generator().manual_seed(1))]
    with pytest.warns(EckartWarning, match="made the held-out loss worse"):
        recover(model, noise, 20, learning_rate=1e-2, held_out=data, progress=False)
