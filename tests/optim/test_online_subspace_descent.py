"""Online Subspace Descent against a double precision twin with automatic differentiation and torch's own AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eckart.optim import GaLoreAdamW, OnlineSubspaceDescent, OnlineSubspaceDescent8bit
from eckart.optim.online_subspace_descent import orthogonality_gradient
from eckart.optim.projection import reconstruction_error
from optimizer_runs import gradients

SHAPES = [(12, 7), (7, 12), (9, 9)]


def run(weight: torch.Tensor, stream: list[torch.Tensor], kind=OnlineSubspaceDescent, rates=(), **options):
    parameter = nn.Parameter(weight.clone())
    optimizer = kind([parameter], **options)
    for step, gradient in enumerate(stream):
        parameter.grad = gradient.clone()
        if rates:
            optimizer.param_groups[0]["lr"] = rates[step] * optimizer.param_groups[0]["initial_lr"]
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


def twin(weight, stream, rank, lr, interval, rule, penalty, decay, rates, scale=0.25, lion=False):
    """The published algorithm; G is turned so that P (n, r) is on its right, which changes none of its numbers."""
    tall = weight.shape[0] >= weight.shape[1]
    weight, stream = (weight, stream) if tall else (weight.mT, [gradient.mT for gradient in stream])
    weight, first, second = weight.clone(), torch.zeros(()), torch.zeros(())
    p = torch.linalg.svd(stream[0], full_matrices=False)[2][:rank].mT.clone().requires_grad_()
    adam = torch.optim.AdamW([p], lr=1.0, weight_decay=decay)
    optimizer = adam if rule == "adamw" else torch.optim.SGD([p], lr=1.0)
    for t, gradient in enumerate(stream, start=1):
        low, used = gradient @ p.detach(), p.detach().clone()
        if t > 1:
            unit = gradient / gradient.norm()
            loss = (unit @ p @ p.mT - unit).norm() ** 2 + penalty * (p.mT @ p - torch.eye(rank)).norm() ** 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = rates[t - 1] / interval
            optimizer.step()
        if lion:
            update = ((0.9 * first + 0.1 * low) @ used.mT).sign()
            first = 0.99 * first + 0.01 * low
        else:
            first, second = 0.9 * first + 0.1 * low, 0.999 * second + 0.001 * low**2
            update = scale * first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-6) @ used.mT
        weight = weight - lr * rates[t - 1] * update
    return weight if tall else weight.mT


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rule", "penalty", "decay"), [("adamw", 0.0, 0.01), ("adamw", 0.3, 0.0), ("sgd", 0.1, 0.0)])
@pytest.mark.parametrize("lion", [False, True])
def test_it_is_the_algorithm_of_the_paper(shape, rule, penalty, decay, lion):
    stream, weight, rates = gradients(shape, 8), gradients(shape, 1)[0], [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.0]
    expected = twin(weight, stream, 3, 0.1, 20, rule, penalty, decay, rates, lion=lion)
    options = {"rule": "lion", "betas": (0.9, 0.99)} if lion else {}
    found, _ = run(
        weight, stream, rates=rates, rank=3, lr=0.1, update_interval=20, basis_rule=rule, orthogonality=penalty,
        basis_decay=decay, **options,
    )  # fmt: skip
    assert torch.allclose(found, expected, atol=1e-9)


def test_the_gradients_in_closed_form_are_those_of_automatic_differentiation():
    a, basis = gradients((12, 7), 1)[0], gradients((7, 3), 1, seed=5)[0].requires_grad_()  # not orthonormal
    a = 1e-9 * a
    unit = a / a.norm()
    error = (unit @ basis @ basis.mT - unit).norm() ** 2
    penalty = (basis.mT @ basis - torch.eye(3)).norm() ** 2
    for low in (None, a @ basis.detach()):
        found, slope = reconstruction_error(a, basis.detach(), low)
        assert torch.allclose(found, error.detach(), atol=1e-12)
        assert torch.allclose(slope, torch.autograd.grad(error, basis, retain_graph=True)[0], atol=1e-12)
    slope = orthogonality_gradient(basis.detach())
    assert torch.allclose(slope, torch.autograd.grad(penalty, basis)[0], atol=1e-12)


def test_the_loss_is_one_without_a_basis_and_the_tail_of_the_spectrum_at_its_minimum():
    a = gradients((12, 7), 1)[0]
    _, values, vh = torch.linalg.svd(a, full_matrices=False)
    error, slope = reconstruction_error(a, torch.zeros(7, 3, dtype=torch.float64))
    assert float(error) == 1.0
    assert not bool(slope.any())
    error, slope = reconstruction_error(a, vh[:3].mT)
    assert torch.allclose(error, values[3:].square().sum() / values.square().sum())
    assert torch.allclose(slope, torch.zeros_like(slope), atol=1e-12)
    rotated = vh[:3].mT @ torch.linalg.qr(gradients((3, 3), 1)[0])[0]
    assert torch.allclose(reconstruction_error(a, rotated)[0], error)
    assert float(reconstruction_error(torch.zeros_like(a), vh[:3].mT)[0]) == 0.0


def test_a_basis_that_stands_still_gives_galore():
    stream, weight = gradients((12, 7), 6), gradients((12, 7), 1)[0]
    found, _ = run(weight, stream, rank=3, update_interval=10**12)
    fixed, _ = run(weight, stream, GaLoreAdamW, rank=3, update_interval=100, stagger=False)
    moving, _ = run(weight, stream, rank=3)
    assert torch.allclose(found, fixed, atol=1e-10)
    assert not torch.allclose(moving, fixed, atol=1e-4)


def test_the_basis_freezes_with_the_learning_rate():
    stream, rates = gradients((12, 7), 6), [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    _, early = run(torch.zeros_like(stream[0]), stream[:3], rates=rates[:3], rank=3)
    _, late = run(torch.zeros_like(stream[0]), stream, rates=rates, rank=3)
    assert torch.equal(early["basis"], late["basis"])
    assert not torch.equal(early["basis_first"], late["basis_first"])


def test_lion_moves_every_entry_by_the_learning_rate_and_is_of_full_rank():
    stream = gradients((12, 7), 2)
    found, state = run(torch.zeros_like(stream[0]), stream[:1], rank=2, rule="lion", lr=0.1)
    assert torch.equal(found.abs(), torch.full_like(found, 0.1))
    assert int(torch.linalg.matrix_rank(found)) > 2
    assert "second" not in state


def rotating(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 60, generator=generator))[0] for n in (90, 60))
    k = torch.randn(60, 60, generator=generator)
    turn, stream = torch.matrix_exp(0.001 * (k - k.mT)), []
    for _ in range(steps):
        v = turn @ v
        noise = torch.randn(90, 60, generator=generator)
        stream.append(1e-4 * ((u * 0.8 ** torch.arange(60)) @ v.mT + 0.01 * noise))
    return stream


def test_it_follows_a_rotating_gradient_where_galore_waits():
    stream = rotating(150)
    best = torch.linalg.svdvals(stream[-1])[:6].square().sum()

    def share(kind, **options) -> float:
        _, state = run(torch.zeros_like(stream[0]), stream, kind, rank=6, **options)
        q = torch.linalg.qr(state["basis"])[0]
        return float((stream[-1] @ q).square().sum() / best)

    assert share(OnlineSubspaceDescent) > 0.97
    assert share(OnlineSubspaceDescent8bit) > 0.97
    assert share(OnlineSubspaceDescent, basis_rule="sgd", update_interval=4) > 0.8
    assert share(GaLoreAdamW, update_interval=200, stagger=False) < 0.6


def test_the_penalty_keeps_the_basis_orthonormal():
    stream = rotating(150)

    def departure(penalty: float) -> float:
        _, state = run(torch.zeros_like(stream[0]), stream, rank=6, orthogonality=penalty)
        basis = state["basis"]
        return float((basis.mT @ basis - torch.eye(6)).norm())

    assert departure(0.1) < 0.7 * departure(0.0)


def test_gradients_of_zeros_leave_a_basis_that_can_go_on():
    zeros, some = torch.zeros(60, 50), gradients((60, 50), 2)[0].float()
    found, state = run(torch.ones(60, 50), [zeros] * 3, rank=3)
    assert torch.equal(found, torch.ones(60, 50))
    assert torch.allclose(state["basis"].mT @ state["basis"], torch.eye(3), atol=1e-4)
    _, state = run(torch.ones(60, 50), [some, zeros, zeros, some], rank=3)
    assert all(bool(value.isfinite().all()) for value in state.values())


def test_the_state_is_what_the_paper_says():
    weight, stream = torch.zeros(40, 24), [g.float() for g in gradients((40, 24), 3)]
    _, state = run(weight, stream, rank=4)
    assert sum(value.numel() for name, value in state.items() if name != "step") == 2 * 4 * 40 + 3 * 4 * 24
    _, plain = run(weight, stream, rank=4, basis_rule="sgd")
    assert sorted(plain) == ["basis", "first", "second", "step"]
    _, small = run(weight, stream, OnlineSubspaceDescent8bit, rank=4)
    names = ("first", "second", "basis_first", "basis_second", "basis")
    assert [small[name].dtype for name in names] == [*[torch.int8, torch.uint8] * 2, torch.float32]


def test_bad_options():
    weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="basis_rule must be one of adamw, sgd"):
        OnlineSubspaceDescent([weight], basis_rule="lion")
    for option in ("basis_decay", "orthogonality"):
        with pytest.raises(ValueError, match="basis_decay and orthogonality must not be negative"):
            OnlineSubspaceDescent([weight], **{option: -0.1})
