"""GaLore against a plain double precision twin, and what the paper promises of its state and its updates."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from eckart.optim import GaLoreAdamW, GaLoreAdamW8bit
from eckart.optim.contract import Step
from eckart.optim.projection import exact_basis, improved_basis
from optimizer_runs import gradients, run_stream

SHAPES = [(12, 7), (7, 12), (9, 9)]


def run(weight: torch.Tensor, stream: list[torch.Tensor], kind=GaLoreAdamW, **options):
    return run_stream(kind, weight, stream, **options)


def twin(weight, stream, rank, lr, interval, scale, betas=(0.9, 0.999), eps=1e-6, decay=0.0):
    """The algorithm of the paper, written with numbers and whole matrices."""
    weight = weight.clone()
    left = weight.shape[0] < weight.shape[1]
    first = second = 0.0
    for t, gradient in enumerate(stream, start=1):
        if (t - 1) % interval == 0:
            u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
            basis = u[:, :rank] if left else vh[:rank].mT
        low = basis.mT @ gradient if left else gradient @ basis
        first = betas[0] * first + (1 - betas[0]) * low
        second = betas[1] * second + (1 - betas[1]) * low**2
        n = first / (1 - betas[0] ** t) / ((second / (1 - betas[1] ** t)).sqrt() + eps)
        weight = weight * (1 - lr * decay) - lr * scale * (basis @ n if left else n @ basis.mT)
    return weight


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_algorithm_of_the_paper(shape):
    stream = gradients(shape, 7)
    weight = gradients(shape, 1)[0]
    # Within one interval: at a refresh the moments stay, and the signs of singular vectors are a matter of convention.
    options = {"rank": 3, "lr": 0.1, "scale": 0.5}
    found, _ = run(weight, stream, update_interval=7, refresh="svd", stagger=False, weight_decay=0.2, **options)
    assert torch.allclose(found, twin(weight, stream, interval=7, decay=0.2, **options), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_refreshed_every_step_without_momentum_signs_do_not_matter(shape):
    stream, weight = gradients(shape, 5), gradients(shape, 1)[0]
    options = {"rank": 3, "lr": 0.1, "scale": 0.5, "betas": (0.0, 0.9)}
    found, _ = run(weight, stream, update_interval=1, refresh="svd", **options)
    assert torch.allclose(found, twin(weight, stream, interval=1, **options), atol=1e-12)


def test_what_does_not_fit_is_torchs_adamw():
    for shape in ((7, 3), (5,), (2, 3, 4)):
        stream, weight = gradients(shape, 4), gradients(shape, 1)[0]
        found, state = run(weight, stream, rank=3, lr=0.1, weight_decay=0.1, eps=1e-8)
        parameter = nn.Parameter(weight.clone())
        adam = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1)
        for gradient in stream:
            parameter.grad = gradient.clone()
            adam.step()
        assert torch.allclose(found, parameter.detach(), atol=1e-12)
        assert "basis" not in state


def test_an_update_has_rank_r_and_training_has_more():
    weight, stream = torch.zeros(12, 9, dtype=torch.float64), gradients((12, 9), 6)
    within, _ = run(weight, stream[:3], rank=2, update_interval=3)
    beyond, _ = run(weight, stream, rank=2, update_interval=3)
    assert int(torch.linalg.matrix_rank(within)) == 2
    assert int(torch.linalg.matrix_rank(beyond)) == 4


def test_the_state_is_what_the_paper_says_and_holds_no_views():
    weight = torch.zeros(40, 24)
    stream = [g.float() for g in gradients((40, 24), 2)]
    _, state = run(weight, stream, rank=4, refresh="svd")
    held = {name: value for name, value in state.items() if name != "step"}
    assert sum(value.numel() for value in held.values()) == 4 * (2 * 40 + 24)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in held.values())
    _, small = run(weight, stream, GaLoreAdamW8bit, rank=4)
    assert {name: value.dtype for name, value in small.items() if name in ("first", "second")} == {
        "first": torch.int8,
        "second": torch.uint8,
    }


def decaying(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, columns, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator))
    return (u * 0.9 ** torch.arange(columns)) @ v.mT


def test_the_exact_basis_leaves_the_tail_of_the_spectrum():
    a = decaying(90, 60).double()
    q, low = exact_basis(a, 8)
    tail = torch.linalg.svdvals(a)[8:].square().sum()
    assert torch.allclose((a - low @ q.mT).square().sum(), tail, rtol=1e-10)


@pytest.mark.parametrize("size", [(300, 200), (90, 30)])
def test_the_improved_basis_is_orthonormal_sorted_and_near_the_best(size):
    a = decaying(*size) * 1e-12  # as small as gradients get
    q, low = improved_basis(a, None, 10, torch.Generator().manual_seed(0))
    assert torch.allclose(q.mT @ q, torch.eye(10), atol=1e-5)
    assert torch.allclose(low, a @ q, rtol=1e-3, atol=1e-17)
    norms = torch.linalg.vector_norm(low, dim=0)
    assert bool((norms.diff() <= 0).all())
    best = torch.linalg.svdvals(a)[:10].square().sum().sqrt()
    assert torch.linalg.vector_norm(low) > 0.999 * best


def test_the_improved_basis_follows_a_rotating_gradient():
    generator = torch.Generator().manual_seed(1)
    basis, shares = None, []
    turn = torch.matrix_exp(0.01 * (lambda x: x - x.mT)(torch.randn(150, 150, generator=generator)))
    a = decaying(200, 150)
    for step in range(8):
        noisy = a + 0.02 * torch.randn(200, 150, generator=generator)
        basis, low = improved_basis(noisy, basis, 12, Step(step + 1).generator())
        best = torch.linalg.svdvals(noisy)[:12].square().sum()
        shares.append(float(low.square().sum() / best))
        a = a @ turn
    assert min(shares) > 0.95


def test_layers_are_refreshed_in_turn_and_each_at_every_interval():
    turns = [[n for n in range(1, 41) if Step(n, index).due(10)] for index in range(5)]
    assert all(turn[0] == 1 for turn in turns)
    later = [turn[1:] for turn in turns]
    assert all(b - a == 10 for turn in later for a, b in itertools.pairwise(turn))
    assert len({turn[0] for turn in later}) == 5
    assert [n for n in range(1, 31) if Step(n, 3).due(10, stagger=False)] == [1, 11, 21]


def test_moments_are_carried_into_a_new_basis():
    weight, stream = torch.zeros(12, 9, dtype=torch.float64), gradients((12, 9), 2)
    _, before = run(weight, stream[:1], rank=3, update_interval=1, refresh="svd")
    _, after = run(weight, stream, rank=3, update_interval=1, refresh="svd", carry=True)
    turn = before["basis"].mT @ after["basis"]
    low = stream[1] @ after["basis"]
    assert torch.allclose(after["first"], 0.9 * before["first"] @ turn + 0.1 * low)
    assert torch.allclose(after["second"], 0.999 * (before["second"].sqrt() @ turn) ** 2 + 0.001 * low**2)


@pytest.mark.parametrize(("side", "expected"), [("short", 7), ("long", 12), ("left", 12), ("right", 7)])
def test_the_side_that_is_projected(side, expected):
    _, state = run(torch.zeros(12, 7, dtype=torch.float64), gradients((12, 7), 1), rank=3, side=side)
    assert state["basis"].shape == (expected, 3)


def test_a_gradient_of_zeros_is_no_error():
    found, state = run(torch.ones(60, 50), [torch.zeros(60, 50)] * 2, rank=3, update_interval=1)
    assert torch.equal(found, torch.ones(60, 50))
    assert bool(state["basis"].isfinite().all())


def test_a_group_that_is_added_later_is_updated_in_the_backward_pass_too():
    first, second = (nn.Parameter(torch.ones(8, 6)) for _ in range(2))
    optimizer = GaLoreAdamW([first], lr=0.1, rank=2, fused_backward=True)
    optimizer.add_param_group({"params": [second], "rank": 2})
    (first.sum() + second.sum()).backward()
    assert first.grad is None
    assert second.grad is None
    assert torch.allclose(first, second)
    assert not torch.equal(second, torch.ones(8, 6))
