"""LIFT against a plain double precision twin with dense masks, and what is left alone by it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from eckart.optim import LIFTAdamW, LIFTAdamW8bit
from eckart.optim.contract import Step
from eckart.optim.lift import LIFT, low_rank_magnitude
from eckart.optim.moments import load
from optimizer_runs import gradients, run_stream

SHAPES = [(24, 15), (15, 24), (18, 18)]


def run(weight: torch.Tensor, stream: list[torch.Tensor], kind=LIFTAdamW, **options):
    return run_stream(kind, weight, stream, **options)


def largest(score: torch.Tensor, k: int) -> torch.Tensor:
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[score.flatten().argsort(descending=True)[:k]] = True
    return mask.reshape(score.shape)


def principal(weight: torch.Tensor, r: int, k: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return largest((u[:, :r] * s[:r] @ vh[:r]).abs(), k)


def twin(weight, stream, rank, r, interval, lr, decay=0.0, betas=(0.9, 0.95), eps=1e-6):
    """The algorithm of the paper with dense moments; the mask after every step too."""
    weight, mask, masks = weight.clone(), torch.zeros(weight.shape, dtype=torch.bool), []
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, gradient in enumerate(stream, start=1):
        if (t - 1) % interval == 0:
            new = principal(weight, r, sum(weight.shape) * rank)
            first, second, mask = first * (mask & new), second * (mask & new), new
        first = torch.where(mask, betas[0] * first + (1 - betas[0]) * gradient, first)
        second = torch.where(mask, betas[1] * second + (1 - betas[1]) * gradient**2, second)
        n = first / (1 - betas[0] ** t) / ((second / (1 - betas[1] ** t)).sqrt() + eps)
        weight = torch.where(mask, weight * (1 - lr * decay) - lr * n, weight)
        masks.append(mask)
    return weight, masks


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_it_is_the_algorithm_of_the_paper(shape, decay):
    weight, stream = gradients(shape, 1, seed=0)[0], gradients(shape, 8)
    options = {"rank": 2, "filter_rank": 3, "update_interval": 3, "lr": 0.05, "weight_decay": decay}
    found, state = run(weight, stream, **options)
    expected, masks = twin(weight, stream, 2, 3, 3, 0.05, decay)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert 0 < int((masks[0] & masks[-1]).sum()) < 2 * sum(shape)  # some entries stayed, some did not
    assert torch.equal(state["indices"].long(), masks[-1].flatten().nonzero()[:, 0])
    assert torch.equal(found[~(masks[0] | masks[3] | masks[6])], weight[~(masks[0] | masks[3] | masks[6])])


@pytest.mark.parametrize("kind", [LIFTAdamW, LIFTAdamW8bit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_an_interval_all_other_entries_keep_their_bits(kind, dtype):
    weight = gradients((60, 50), 1)[0].to(dtype)
    stream = gradients((60, 50), 5)
    options = {"rank": 3, "lr": 0.1, "weight_decay": 0.1, "stochastic_rounding": True}
    found, state = run(weight, stream, kind, **options)
    changed = (found != weight).flatten()
    assert int(changed.sum()) == len(state["indices"]) == 330
    assert bool(changed[state["indices"].long()].all())


def test_the_state_is_k_integers_and_moments_of_k_numbers():
    weight, stream = gradients((60, 50), 1)[0].float(), gradients((60, 50), 2)
    _, state = run(weight, stream, rank=3)
    assert {name: (tuple(value.shape), value.dtype) for name, value in state.items() if name != "step"} == {
        "indices": ((330,), torch.int32), "first": ((330,), torch.float32), "second": ((330,), torch.float32),
    }  # fmt: skip
    _, small = run(weight, stream, LIFTAdamW8bit, rank=3)
    assert small["first"].shape == small["second"].shape == (2, 256)
    assert (small["first"].dtype, small["second"].dtype) == (torch.int8, torch.uint8)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in small.values())
    kept = (state["first"] - _unpacked(small, "first")).norm() / state["first"].norm()
    assert float(kept) < 0.05


def _unpacked(state, name: str) -> torch.Tensor:
    return load(state, name).flatten()[: len(state["indices"])]


def test_a_filter_of_full_rank_selects_the_largest_weights():
    weight = gradients((24, 15), 1)[0]
    assert torch.equal(low_rank_magnitude(weight, 15, torch.Generator()), weight.abs())
    _, filtered = run(weight, gradients((24, 15), 1), rank=2, filter_rank=40)
    _, plain = run(weight, gradients((24, 15), 1), rank=2, selection="magnitude")
    expected = largest(weight.abs(), 78).flatten().nonzero()[:, 0]
    assert torch.equal(filtered["indices"].long(), expected)
    assert torch.equal(plain["indices"].long(), expected)


def test_other_selections():
    weight, stream = gradients((24, 15), 1)[0], gradients((24, 15), 3)
    _, state = run(weight, stream[:1], rank=2, selection="gradient")
    assert torch.equal(state["indices"].long(), largest(stream[0].abs(), 78).flatten().nonzero()[:, 0])
    drawn = [run(weight, stream[:n], rank=2, selection="random", update_interval=2)[1] for n in (1, 1, 2, 3)]
    indices = [state["indices"].tolist() for state in drawn]
    assert indices[0] == indices[1] == indices[2] != indices[3]
    assert all(len(set(found)) == 78 for found in indices)
    assert indices[0] != run(weight, stream[:1], rank=2, selection="random", seed=1)[1]["indices"].tolist()


@pytest.mark.parametrize("weight", [torch.zeros(60, 50), torch.ones(60, 50), torch.ones(60, 50) * 1e-30])
def test_ties_still_give_k_entries(weight):
    found, state = run(weight, gradients((60, 50), 2), rank=3, update_interval=1)
    assert len(set(state["indices"].tolist())) == 330
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("spectrum", [0.9 ** torch.arange(220), torch.linspace(1, 0.3, 220)])
@pytest.mark.parametrize("transposed", [False, True])
def test_iteration_finds_the_mask_of_the_exact_decomposition(spectrum, transposed):
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(300, 220, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(220, 220, generator=generator))
    weight = 1e-3 * (u * spectrum) @ v.mT
    weight = weight.mT if transposed else weight
    exact = principal(weight.double(), 16, 3000)
    found = largest(low_rank_magnitude(weight, 16, generator), 3000)
    assert int((exact & found).sum()) > 0.98 * 3000
    assert int((exact & largest(weight.abs(), 3000)).sum()) < 0.9 * 3000  # the filter matters


@pytest.mark.parametrize("bits", [32, 8])
def test_moments_of_entries_that_are_chosen_again_are_kept_and_others_start_at_zero(bits):
    weight, gradient = gradients((24, 15), 2)
    method = LIFT(rank=2, filter_rank=3, update_interval=10, bits=bits)
    state = method.allocate(weight)
    method.direction(gradient, state, Step(1), weight)
    before = {name: value.clone() for name, value in state.items()}
    method.select(gradient, state, Step(11), weight)
    assert all(torch.equal(state[name], value) for name, value in before.items())
    method.select(gradient, state, Step(21), gradients((24, 15), 1, seed=8)[0])
    old, new = before["indices"].tolist(), state["indices"].tolist()
    assert 0 < len(set(old) & set(new)) < len(old)
    for name in ("first", "second"):
        earlier = dict(zip(old, _unpacked(before, name).tolist(), strict=True))
        for index, value in zip(new, _unpacked(state, name).tolist(), strict=True):
            assert math.isclose(value, earlier.get(index, 0.0), rel_tol=1e-6 if bits == 32 else 0.2)


def test_a_budget_above_the_matrix_is_torchs_adamw():
    for shape in ((7, 3), (5, 5)):
        stream, weight = gradients(shape, 4), gradients(shape, 1)[0]
        found, _ = run(weight, stream, rank=3, lr=0.1, weight_decay=0.1, eps=1e-8)
        parameter = nn.Parameter(weight.clone())
        adam = torch.optim.AdamW([parameter], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
        for gradient in stream:
            parameter.grad = gradient.clone()
            adam.step()
        assert torch.allclose(found, parameter.detach(), rtol=0, atol=1e-12)


def test_what_has_no_rank_is_left_and_only_counted():
    matrix, vector = nn.Parameter(torch.ones(6, 5)), nn.Parameter(torch.ones(5))
    for rest in (False, True):
        optimizer = LIFTAdamW([matrix, vector], lr=0.1, rank=1, trains_rest=rest)
        matrix.grad, vector.grad = torch.ones(6, 5), torch.ones(5)
        before = vector.detach().clone()
        optimizer.step()
        assert torch.equal(vector, before) != rest
        assert (optimizer.state[vector].keys() == {"step"}) != rest


def test_in_bfloat16_random_rounding_keeps_what_rounding_to_nearest_loses():
    weight, gradient = torch.full((64, 64), 1.0, dtype=torch.bfloat16), torch.ones(64, 64)
    options = {"rank": 32, "lr": 1e-4, "selection": "magnitude"}
    with pytest.warns(UserWarning, match="pass stochastic_rounding=True"):
        lost, _ = run(weight, [gradient] * 5, **options)
    assert torch.equal(lost, weight)
    moved, _ = run(weight, [gradient] * 5, stochastic_rounding=True, **options)
    assert float((moved.double() - 1).mean()) == pytest.approx(-5e-4, rel=0.2)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="filter_rank must be positive"):
        LIFT(filter_rank=0)
    with pytest.raises(ValueError, match="selection must be one of lift, magnitude"):
        LIFT(selection="largest")
    with pytest.raises(ValueError, match=r"must not be 'adafactor'.*take 'adamw'"):
        LIFT(rule="adafactor")
