from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

import tiny_models
from eckart.models.distill import distill, distillation_loss
from model_state import assert_unchanged, snapshot


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(z_s, z_t, ids, mask, temperature: float, task_weight: float) -> float:
    """Token by token, from the definition of both terms."""

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z - z.max())
        return e / e.sum()

    task, divergence = [], []
    for row in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            if not mask[row, t]:
                continue
            p, q = (softmax(z[row, t].numpy() / temperature) for z in (z_t, z_s))
            divergence.append(float((p * np.log(p / q)).sum()))
            if t + 1 < ids.shape[1] and mask[row, t + 1]:
                task.append(-math.log(softmax(z_s[row, t].numpy())[ids[row, t + 1]]))
    return task_weight * np.mean(task) + (1 - task_weight) * temperature**2 * np.mean(divergence)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("task_weight", [0.0, 0.3, 1.0])
def test_the_loss_is_its_definition(temperature, task_weight):
    student, teacher = normal(2, 5, 7), normal(2, 5, 7, seed=1)
    ids = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
    found = distillation_loss(student, teacher, ids, mask, temperature=temperature, task_weight=task_weight)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(by_hand(student, teacher, ids, mask, temperature, task_weight), rel=1e-12)


def test_the_gradient_vanishes_where_student_and_teacher_agree():
    z = normal(1, 4, 6).requires_grad_()
    ids, mask = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool)
    loss = distillation_loss(z, z.detach(), ids, mask, temperature=2.0, task_weight=0.0)
    (gradient,) = torch.autograd.grad(loss, z)
    assert abs(float(loss.detach())) < 1e-14
    assert float(gradient.abs().max()) < 1e-14


def test_a_batch_without_a_token_to_predict_costs_nothing():
    z, ids = normal(1, 1, 6), torch.zeros(1, 1, dtype=torch.long)
    loss = distillation_loss(z, z, ids, torch.ones(1, 1, dtype=torch.bool), temperature=1.0, task_weight=1.0)
    assert float(loss) == 0


def pair(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, torch.nn.Module]:
    teacher = tiny_models.FAMILIES["llama"]().to(dtype)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for layer in student.model.layers:
            layer.mlp.down_proj.weight.mul_(0.1)
    return student, teacher


def batches(model: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    whole = tiny_models.inputs(model, 6, 16)
    return [{key: value[i : i + 2] for key, value in whole.items()} for i in (0, 2, 4)]


def test_the_student_comes_nearer_and_the_teacher_stays():
    student, teacher = pair()
    before = snapshot(teacher)
    losses = distill(student, teacher, batches(teacher), steps=60, learning_rate=3e-3, task_weight=0.0, progress=False)
    assert len(losses) == 60
    assert np.mean(losses[-6:]) < 0.2 * np.mean(losses[:6])
    assert_unchanged(teacher, before)
    assert not student.training
    assert all(parameter.grad is None for parameter in student.parameters())


def test_the_same_seed_gives_the_same_student_and_another_one_another():
    results = []
    for seed in (0, 0, 1):
        student, teacher = pair()
        distill(student, teacher, batches(teacher), steps=4, learning_rate=1e-3, seed=seed, progress=False)
        results.append(tiny_models.logits(student))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_every_batch_is_used_once_before_any_is_used_again():
    student, teacher = pair()
    seen: list[int] = []
    given = batches(teacher)
    student.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(
            [torch.equal(kwargs["input_ids"], b["input_ids"]) for b in given].index(True)
        ),
        with_kwargs=True,
    )
    distill(student, teacher, given, steps=6, learning_rate=1e-3, progress=False)
    assert sorted(seen[:3]) == sorted(seen[3:]) == [0, 1, 2]


def test_half_precision_is_trained_in_float32_and_given_back_as_it_was():
    student, teacher = pair(torch.bfloat16)
    first = student.model.layers[0].mlp.up_proj.weight.detach().clone()
    # A step of 1e-5 is below the resolution of bfloat16 for most of these weights; forty of them are not.
    distill(student, teacher, batches(teacher), steps=40, learning_rate=5e-5, progress=False)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert float((student.model.layers[0].mlp.up_proj.weight != first).float().mean()) > 0.5


def test_padding_is_nothing_to_learn_from():
    results = []
    for pad in (False, True):
        student, teacher = pair()
        given = batches(teacher)
        if pad:
            filler = torch.full((2, 5), 9)
            given = [
                {
                    "input_ids": torch.cat([b["input_ids"], filler], 1),
                    "attention_mask": torch.cat([b["attention_mask"], torch.zeros_like(filler)], 1),
                }
                for b in given
            ]
        results.append(distill(student, teacher, given, steps=3, learning_rate=1e-3, progress=False))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)


def test_a_loss_that_is_no_number_ends_it():
    student, teacher = pair()
    student.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="distillation step 1 is nan; lower learning_rate"):
        distill(student, teacher, batches(teacher), steps=2, learning_rate=1e-3, progress=False)
