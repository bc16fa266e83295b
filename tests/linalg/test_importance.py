"""The oracle is AdaLoRA's update written with scalars, in Python's own float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError
from eckart.linalg.importance import (
    Importance,
    most_important,
    sensitivity,
    triplet_importance,
    update_importance,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=6),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.99),
)
def test_update_against_scalars(steps, beta1, beta2):
    state, smooth, uncertain = None, 0.0, 0.0
    for weight, gradient in steps:
        current = abs(weight * gradient)
        smooth = beta1 * smooth + (1 - beta1) * current
        uncertain = beta2 * uncertain + (1 - beta2) * abs(current - smooth)
        arguments = (torch.full((2,), x, dtype=torch.float64) for x in (weight, gradient))
        state = update_importance(state, *arguments, beta1=beta1, beta2=beta2)
    assert state.sensitivity.tolist() == pytest.approx([smooth] * 2, abs=1e-13)
    assert state.uncertainty.tolist() == pytest.approx([uncertain] * 2, abs=1e-13)
    assert state.score.tolist() == pytest.approx([smooth * uncertain] * 2, abs=1e-12)


def test_defaults_are_the_papers():
    weight, gradient = normal(3, 4), normal(3, 4, seed=1)
    expected = update_importance(None, weight, gradient, beta1=0.85, beta2=0.85)
    result = update_importance(None, weight, gradient)
    assert torch.equal(result.score, expected.score)
    # A constant sensitivity is certain in the end.
    for _ in range(300):
        result = update_importance(result, weight, gradient)
    torch.testing.assert_close(result.sensitivity, (weight * gradient).abs(), rtol=1e-12, atol=0)
    assert float(result.uncertainty.max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_and_inputs_stay(dtype):
    weight, gradient = normal(4).to(dtype).requires_grad_(), normal(4, seed=1).to(dtype)
    before = update_importance(None, weight, gradient)
    kept = Importance(*(part.clone() for part in before))
    after = update_importance(before, weight, gradient)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert after.sensitivity.dtype == after.uncertainty.dtype == wanted
    assert not after.sensitivity.requires_grad
    assert torch.equal(before.sensitivity, kept.sensitivity)
    assert torch.equal(before.uncertainty, kept.uncertainty)


def test_small_gradients_keep_their_order():
    """The product of two sensitivities of 1e-24 is nothing in float32."""
    weight, gradient = torch.ones(2), torch.tensor([1e-24, 2e-24])
    score = update_importance(None, weight, gradient).score
    assert float(score[1]) == pytest.approx(4 * float(score[0]), rel=1e-5)
    assert float(score[0]) > 0


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 6), n=st.integers(1, 6), k=st.integers(1, 4), batch=st.sampled_from([(), (3,)]))
def test_triplets_against_a_loop(m, n, k, batch):
    values, left, right = (
        normal(*batch, k).abs(),
        normal(*batch, m, k, seed=1).abs(),
        normal(*batch, k, n, seed=2).abs(),
    )
    result = triplet_importance(values, left, right)
    assert result.shape == values.shape
    for i in range(k):
        mean_left = sum(left[..., j, i] for j in range(m)) / m
        mean_right = sum(right[..., i, j] for j in range(n)) / n
        torch.testing.assert_close(result[..., i], values[..., i] + mean_left + mean_right)


def test_sensitivity_is_the_first_order_change_of_the_loss():
    """For a loss linear in the weights, |w g| is exactly what setting w to zero changes."""
    weight, slope = normal(5).requires_grad_(), normal(5, seed=1)
    (weight @ slope).backward()
    loss = (weight @ slope).detach()
    without = [(weight * (torch.arange(5) != i)) @ slope for i in range(5)]
    change = [abs(float(loss - other.detach())) for other in without]
    assert sensitivity(weight, weight.grad).tolist() == pytest.approx(change, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    scores=st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.5]), max_size=6), max_size=4),
    budget=st.integers(0, 20),
)
def test_exactly_the_budget_is_kept_and_the_best(scores, budget):
    masks = most_important([torch.tensor(s) for s in scores], budget)
    assert [mask.shape for mask in masks] == [(len(s),) for s in scores]
    kept = [x for s, mask in zip(scores, masks, strict=True) for x, keep in zip(s, mask.tolist(), strict=True) if keep]
    everything = sorted((x for s in scores for x in s), reverse=True)
    assert sorted(kept, reverse=True) == everything[:budget]


def test_ties_go_to_the_first():
    masks = most_important([torch.zeros(3), torch.zeros(3)], 4)
    assert [mask.tolist() for mask in masks] == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sensitivity(torch.ones(2), torch.ones(3)), LinalgError, r"gradient: .*does not fit .* \(2,\)"),
        (lambda: sensitivity(torch.ones(1), torch.tensor([float("nan")])), LinalgError, "times the weight is NaN or I"),
        (lambda: sensitivity(torch.full((1,), 1e30), torch.full((1,), 1e30)), LinalgError, "is NaN or Inf"),
        (lambda: update_importance(None, torch.ones(1), torch.ones(1), beta1=1.0), ValueError, r"beta1 must be in \[0"),
        (lambda: update_importance(None, torch.ones(1), torch.ones(1), beta2=-0.1), ValueError, r"beta2 must be in \["),
        (lambda: triplet_importance(torch.ones(2), torch.ones(3, 1), torch.ones(2, 3)), LinalgError, "do not fit left"),
        (lambda: triplet_importance(torch.ones(2), torch.ones(3, 2), torch.ones(3, 2)), LinalgError, "right of shape"),
        (lambda: triplet_importance(torch.ones(2), torch.ones(2), torch.ones(2)), LinalgError, "do not fit left"),
        (lambda: most_important([torch.ones(2)], -1), ValueError, "budget must be at least 0"),
        (lambda: most_important([torch.ones(2, 2)], 1), LinalgError, r"scores\[0\]: .*not a finite vector"),
        (lambda: most_important([torch.ones(1), torch.tensor([float("inf")])], 1), LinalgError, r"scores\[1\]"),
    ],
)
def test_what_has_no_answer_is_refused(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
