"""COAP against a double precision twin with automatic differentiation, and what moves the basis and what does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, mse_loss

from eckart.optim import COAPAdamW, COAPAdamW8bit
from eckart.optim.coap import correlation_loss, mean_cosine
from eckart.optim.contract import Step
from optimizer_runs import gradients, run_stream

SHAPES = [(12, 7), (7, 12), (9, 9)]


def run(weight: torch.Tensor, stream: list[torch.Tensor], kind=COAPAdamW, **options):
    return run_stream(kind, weight, stream, **options)


def bases(stream: list[torch.Tensor], **options) -> list[torch.Tensor]:
    """The basis after each step."""
    parameter = nn.Parameter(torch.zeros_like(stream[0]))
    optimizer, found = COAPAdamW([parameter], **options), []
    for gradient in stream:
        parameter.grad = gradient.clone()
        optimizer.step()
        found.append(optimizer.state[parameter]["basis"].clone())
    return found


def published_loss(p: torch.Tensor, moment: torch.Tensor, gradient: torch.Tensor, right: bool) -> torch.Tensor:
    """MSE(Ĝ, G) (1 - cos(M̂, G)) with P (r, n) on the right and (m, r) on the left."""
    back = gradient @ p.mT @ p if right else p @ p.mT @ gradient
    lifted = moment @ p if right else p @ moment
    return mse_loss(back, gradient) * (1 - cosine_similarity(lifted, gradient, dim=1).mean())


def twin(weight, stream, rank, lr, interval, factor, scale, normalize=True, betas=(0.9, 0.999), eps=1e-6, decay=0.0):
    """The published algorithm on whole matrices; recalibrated by a full decomposition."""
    weight, right = weight.clone(), weight.shape[0] >= weight.shape[1]
    first = second = torch.zeros(())
    for t, gradient in enumerate(stream):
        if t % (interval * factor) == 0:
            u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
            p = vh[:rank] if right else u[:, :rank]
        elif t % interval == 0:
            p = p.clone().requires_grad_()
            shown = gradient / gradient.square().mean().sqrt() if normalize else gradient
            with torch.enable_grad():
                published_loss(p, first, shown, right).backward()
            nn.utils.clip_grad_norm_([p], 1.0)
            p = (p - 0.1 * p.grad).detach()
        low = gradient @ p.mT if right else p.mT @ gradient
        first = betas[0] * first + (1 - betas[0]) * low
        second = betas[1] * second + (1 - betas[1]) * low**2
        n = first / (1 - betas[0] ** (t + 1)) / ((second / (1 - betas[1] ** (t + 1))).sqrt() + eps)
        weight = weight * (1 - lr * decay) - lr * scale * (n @ p if right else p @ n)
    return weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_it_is_the_algorithm_of_the_paper(shape, normalize):
    # Between recalibrations, where the signs of singular vectors do not matter. The gradients are large enough for the
    # code's form to be clipped.
    stream = [10 * g for g in gradients(shape, 9)]
    weight = gradients(shape, 1)[0]
    options = {"rank": 3, "lr": 0.1, "scale": 0.5, "normalize": normalize}
    found, _ = run(weight, stream, update_interval=2, reproject_factor=9, stagger=False, weight_decay=0.2, **options)
    assert torch.allclose(found, twin(weight, stream, interval=2, factor=9, decay=0.2, **options), atol=1e-10)
    still, _ = run(weight, stream, update_interval=9, stagger=False, weight_decay=0.2, **options)
    assert not torch.allclose(found, still, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_momentum_signs_do_not_matter_and_it_is_recalibrated_like_the_paper(shape):
    stream, weight = gradients(shape, 9), gradients(shape, 1)[0]
    options = {"rank": 3, "lr": 0.1, "scale": 0.5, "betas": (0.0, 0.9)}
    found, _ = run(weight, stream, update_interval=2, reproject_factor=2, stagger=False, **options)
    assert torch.allclose(found, twin(weight, stream, interval=2, factor=2, **options), atol=1e-10)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_gradient_in_closed_form_is_that_of_automatic_differentiation(axis):
    a, first = gradients((12, 7), 2)
    first, basis = first[:, :3].contiguous(), gradients((7, 3), 1, seed=5)[0].requires_grad_()  # not orthonormal
    a[2], a[:, 4], first[5] = 0.0, 0.0, 0.0
    share = (a - a @ basis @ basis.mT).square().sum() / a.square().sum()
    cosine = cosine_similarity(first @ basis.mT, a, dim=axis).mean()
    for expected, (value, gradient) in (
        (share * (1 - cosine), correlation_loss(a, first, basis.detach(), axis)),
        (cosine, mean_cosine(a, first, basis.detach(), axis)),
    ):
        (slope,) = torch.autograd.grad(expected, basis, retain_graph=True)
        assert torch.allclose(value, expected.detach(), atol=1e-12)
        assert torch.allclose(gradient, slope, atol=1e-12)
    value, gradient = mean_cosine(a, torch.zeros_like(first), basis.detach(), axis)
    assert float(value) == 0.0
    assert not bool(gradient.any())


def test_a_step_lowers_the_loss():
    a, first = gradients((12, 7), 2)
    first, basis = first[:, :3], torch.linalg.qr(gradients((7, 3), 1, seed=5)[0])[0]
    before, slope = correlation_loss(a, first, basis, 1)
    after, _ = correlation_loss(a, first, basis - 1e-3 * slope, 1)
    assert torch.allclose(before - after, 1e-3 * slope.square().sum(), rtol=0.05)


def test_the_step_is_free_of_scale_and_the_codes_is_lost_at_the_size_of_real_gradients():
    stream = gradients((64, 32), 3)

    def moved(scale: float, **options) -> torch.Tensor:
        found = bases([scale * g for g in stream], rank=4, update_interval=2, stagger=False, **options)
        return found[2] - found[1]

    assert float(moved(1e-4).norm()) > 1e-3
    assert torch.allclose(moved(1e-4), moved(1.0), atol=1e-9)
    assert 0 < float(moved(1e-4, normalize=False).norm()) < 1e-9
    assert torch.allclose(moved(1e-4, normalize=False), 1e-8 * moved(1.0, normalize=False), rtol=1e-3, atol=1e-18)


def test_a_recalibrated_basis_is_orthonormal_and_exact_for_a_gradient_of_low_rank():
    x, y = gradients((300, 4), 1)[0], gradients((200, 4), 1, seed=4)[0]
    stream = [x @ y.mT, gradients((300, 200), 1)[0], x @ y.mT]
    for found in (bases(stream[:1], rank=5)[-1], bases(stream, rank=5, update_interval=1, reproject_factor=2)[-1]):
        assert torch.allclose(found.mT @ found, torch.eye(5, dtype=torch.float64), atol=1e-10)
        assert torch.allclose(stream[0] @ found @ found.mT, stream[0], atol=1e-9)


@pytest.mark.parametrize(("stagger", "changes", "recalibrated"), [
    (False, [1, 4, 7, 10, 13, 16, 19], [1, 7, 13, 19]),
    (True, [1, 3, 6, 9, 12, 15, 18], [1, 6, 12, 18]),
])  # fmt: skip
def test_when_the_basis_changes(stagger, changes, recalibrated):
    stream, other = gradients((12, 7), 20), nn.Parameter(torch.zeros(3, dtype=torch.float64))
    parameter = nn.Parameter(torch.zeros_like(stream[0]))
    options = {"rank": 2, "update_interval": 3, "reproject_factor": 2, "stagger": stagger}
    optimizer = COAPAdamW([other, parameter], **options)  # the second one has a phase
    assert Step(3, 1).due(3)
    found, right, last = [], [], None
    for number, gradient in enumerate(stream, start=1):
        parameter.grad = gradient.clone()
        optimizer.step()
        basis = optimizer.state[parameter]["basis"]
        if last is None or not torch.equal(basis, last):
            found.append(number)
            if torch.allclose(basis.mT @ basis, torch.eye(2, dtype=torch.float64), atol=1e-10):
                right.append(number)
        last = basis.clone()
    assert found == changes
    assert right == recalibrated


def test_orthonormalized_steps_span_the_same():
    stream = gradients((12, 7), 2)
    plain = bases(stream, rank=3, update_interval=1)[-1]
    found = bases(stream, rank=3, update_interval=1, orthonormalize=True)[-1]
    assert not torch.allclose(plain.mT @ plain, torch.eye(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(found.mT @ found, torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(found @ (found.mT @ plain), plain, atol=1e-12)
    assert torch.allclose(found, plain, atol=0.05)  # neither signs nor order have changed


@pytest.mark.parametrize("factor", [1, 5])
def test_restored_moments_are_lifted_by_the_old_basis_and_projected_on_the_new(factor):
    weight, stream = torch.zeros(12, 9, dtype=torch.float64), gradients((12, 9), 2)
    options = {"rank": 3, "update_interval": 1, "reproject_factor": factor, "restore_state": True}
    _, before = run(weight, stream[:1], **options)
    _, after = run(weight, stream, **options)
    old, new, low = before["basis"], after["basis"], stream[1] @ after["basis"]
    first, second = before["first"] @ old.mT @ new, (before["second"].sqrt() @ old.mT @ new).square()
    assert not torch.allclose(old, new, atol=1e-4)
    assert torch.allclose(after["first"], 0.9 * first + 0.1 * low)
    assert torch.allclose(after["second"], 0.999 * second + 0.001 * low**2)
    _, left = run(weight, stream, **{**options, "restore_state": False})
    assert torch.allclose(left["first"], 0.9 * before["first"] + 0.1 * low)


def test_it_follows_a_rotating_gradient_further_than_the_codes_form():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 60, generator=generator))[0] for n in (90, 60))
    k = torch.randn(60, 60, generator=generator)
    turn, stream = torch.matrix_exp(0.002 * (k - k.mT)), []
    for _ in range(40):
        stream.append(1e-4 * (u * 0.8 ** torch.arange(60)) @ v.mT)
        v = turn @ v

    def share(**options) -> float:
        basis = bases(stream, rank=6, update_interval=2, reproject_factor=100, **options)[-1]
        kept = torch.linalg.vector_norm(stream[-1] @ torch.linalg.qr(basis)[0])
        return float(kept / torch.linalg.svdvals(stream[-1])[:6].norm())

    assert share(basis_lr=1.0) > share() + 0.02 > share(normalize=False) + 0.04


def test_the_state_is_what_the_paper_says():
    weight, stream = torch.zeros(40, 24), [g.float() for g in gradients((40, 24), 2)]
    _, state = run(weight, stream, rank=4)
    assert sum(value.numel() for name, value in state.items() if name != "step") == 2 * 4 * 40 + 4 * 24
    _, small = run(weight, stream, COAPAdamW8bit, rank=4, update_interval=1)
    assert (small["first"].dtype, small["second"].dtype, small["basis"].dtype) == (
        torch.int8, torch.uint8, torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("rule", ["adafactor", "lion", "sgd"])
def test_other_rules_move_the_basis_by_their_first_moment(rule):
    stream = gradients((12, 7), 2)
    options = {"rank": 3, "rule": rule, "stagger": False}
    _, before = run(torch.zeros_like(stream[0]), stream[:1], **options)
    slope = correlation_loss(stream[1], before["first"], before["basis"], 1)[1]
    _, after = run(torch.zeros_like(stream[0]), stream, update_interval=1, **options)
    expected = before["basis"] - 0.1 * slope / slope.norm().clamp(min=1)
    assert torch.allclose(after["basis"], expected, atol=1e-12)


def test_a_gradient_of_zeros_is_no_error():
    zeros = torch.zeros(60, 50)
    found, state = run(torch.ones(60, 50), [zeros] * 3, rank=3, update_interval=1)
    assert torch.equal(found, torch.ones(60, 50))
    assert bool(state["basis"].isfinite().all())
    random = gradients((60, 50), 1)[0].float()
    _, state = run(torch.ones(60, 50), [random, zeros, random], rank=3, update_interval=1)
    assert bool(state["basis"].isfinite().all())


def test_bad_options():
    weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="reproject_factor must be positive"):
        COAPAdamW([weight], reproject_factor=0)
    with pytest.raises(ValueError, match="basis_lr must be positive"):
        COAPAdamW([weight], basis_lr=-1.0)
    with pytest.raises(ValueError, match=r"first moment; give rule 'sgd' a betas\[0\] above 0"):
        COAPAdamW([weight], rule="sgd", betas=(0.0, 0.9))
