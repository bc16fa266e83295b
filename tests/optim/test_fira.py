"""Fira against a plain double precision twin, and what the paper promises of its residual, limiter and state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eckart.optim import FiraAdamW, GaLoreAdamW
from eckart.optim.contract import Step
from eckart.optim.fira import Fira
from eckart.optim.galore import GaLore
from optimizer_runs import gradients, run_stream

SHAPES = [(12, 7), (7, 12), (9, 9)]
EXACT = {"refresh": "svd", "stagger": False}


def run(weight: torch.Tensor, stream: list[torch.Tensor], kind=FiraAdamW, **options):
    return run_stream(kind, weight, stream, **options)


def twin(weight, stream, rank, lr, scale, norm="column", residual="paper", gamma=1.01, eps=1e-6, decay=0.0):
    """Algorithm 1 of the paper with a left projector, turned for tall matrices; also how often the limiter acted."""
    tall = weight.shape[0] >= weight.shape[1]
    weight = weight.mT.clone() if tall else weight.clone()
    first = second = 0.0
    before, limited = None, 0
    for t, gradient in enumerate(stream, start=1):
        gradient = gradient.mT if tall else gradient
        if t == 1:
            p = torch.linalg.svd(gradient, full_matrices=False)[0][:, :rank]
        low = p.mT @ gradient
        first, second = 0.9 * first + 0.1 * low, 0.999 * second + 0.001 * low**2
        n = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + eps)
        inside = p @ low if residual == "paper" else scale * (p @ low)
        outside = gradient - inside
        if norm == "matrix":
            outside = outside * n.norm() / (low.norm() + 1e-8)
        else:
            for i in range(outside.shape[1]):
                outside[:, i] *= n[:, i].norm() / (low[:, i].norm() + 1e-8)
        if gamma is not None and before is not None:
            limited += bool(outside.norm() > gamma * (before + 1e-8))
            outside = outside * gamma / max(outside.norm() / (before + 1e-8), gamma)
        before = outside.norm()
        update = scale * (p @ n + outside) if residual == "paper" else scale * (p @ n) + outside
        weight = weight * (1 - lr * decay) - lr * update
    return (weight.mT if tall else weight), limited


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"norm": "matrix"}, {"residual": "reference"}, {"gamma": None}, {"residual": "reference", "norm": "matrix"}],
)
def test_it_is_the_algorithm_of_the_paper(shape, options):
    weight, stream = gradients(shape, 1)[0], gradients(shape, 8)
    options = {"rank": 3, "lr": 0.1, "scale": 0.5, **options}
    found, _ = run(weight, stream, update_interval=8, weight_decay=0.2, **EXACT, **options)
    expected, limited = twin(weight, stream, decay=0.2, **options)
    assert torch.allclose(found, expected, atol=1e-12)
    assert options.get("gamma", 1.01) is None or limited > 0


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_at_full_rank_it_is_galore(shape):
    methods = [kind(rank=5, **EXACT) for kind in (Fira, GaLore)]
    states = [method.allocate(torch.zeros(shape, dtype=torch.float64)) for method in methods]
    for t, gradient in enumerate(gradients(shape, 6), start=1):
        fira, galore = (
            method.direction(gradient, state, Step(t), gradient) for method, state in zip(methods, states, strict=True)
        )
        assert torch.allclose(fira, galore, atol=1e-12)
    assert float(states[0]["outside"]) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("residual", "kept"), [("paper", 0.0), ("reference", 0.75)])
def test_the_residual_is_orthogonal_to_the_subspace_in_the_papers_form(shape, residual, kept):
    """In the code's, 1 - scale of the projection is in it; what N is taken from is subtracted to see the residual."""
    method = Fira(rank=3, residual=residual, **EXACT)
    state = method.allocate(torch.zeros(shape, dtype=torch.float64))
    for t, gradient in enumerate(gradients(shape, 3), start=1):
        a = gradient if shape[0] >= shape[1] else gradient.mT
        low = method.project(a, state, Step(t))
        n = torch.full_like(low, 2.0)
        outside = method.combine(a, low, n, state, Step(t)) - 0.25 * n @ state["basis"].mT
        found = outside @ state["basis"] / (0.25 if residual == "paper" else 1)
        step_sizes = n.norm(dim=1) / (low.norm(dim=1) + 1e-8)
        factor = state["outside"] / (step_sizes[:, None] * (a - (1 - kept) * low @ state["basis"].mT)).norm()
        assert torch.allclose(found, kept * factor * step_sizes[:, None] * low, atol=1e-12)


def test_the_residual_is_scaled_as_the_rule_scales_the_projection():
    method = Fira(rank=3, **EXACT)
    a = gradients((12, 7), 1)[0]
    state = method.allocate(torch.zeros_like(a))
    low = method.project(a, state, Step(1))
    n = gradients((12, 3), 1, seed=5)[0]
    before = a - low @ state["basis"].mT
    after = method.combine(a, low, n, state, Step(1)) / 0.25 - n @ state["basis"].mT
    assert torch.allclose(after.norm(dim=1) / before.norm(dim=1), n.norm(dim=1) / low.norm(dim=1))


def growing(shape: tuple[int, int], rank: int, steps: int) -> list[torch.Tensor]:
    """Gradients whose leading part stays, so that it is what the basis holds, and whose rest grows."""
    u, s, vh = torch.linalg.svd(gradients(shape, 1)[0], full_matrices=False)
    lead, rest = (u[:, part] * s[part] @ vh[part] for part in (slice(rank), slice(rank, None)))
    return [lead + 1.5**t * rest for t in range(steps)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_residual_grows_by_at_most_one_per_cent_a_step(shape):
    stream = growing(shape, 3, 6)
    weight, options = torch.zeros(shape, dtype=torch.float64), {"rank": 3, "update_interval": 100, **EXACT}
    sizes = [float(run(weight, stream[:t], **options)[1]["outside"]) for t in range(1, 7)]
    free = [float(run(weight, stream[:t], gamma=1e9, **options)[1]["outside"]) for t in range(1, 7)]
    assert sizes == pytest.approx([sizes[0] * 1.01**t for t in range(6)], rel=1e-6)
    assert free == pytest.approx([free[0] * 1.5**t for t in range(6)], rel=1e-6)


@pytest.mark.parametrize("start", ["zero", "low rank"])
def test_a_start_without_a_residual_does_not_hold_it_down(start):
    shape = (12, 7)
    u, v = gradients((12, 2), 1)[0], gradients((7, 2), 1)[0]
    none = torch.zeros(shape, dtype=torch.float64) if start == "zero" else u @ v.mT
    weight, full, options = torch.zeros_like(none), gradients(shape, 1)[0], {"rank": 3, "update_interval": 9, **EXACT}
    _, after_one = run(weight, [none], **options)
    assert float(after_one["outside"]) < 1e-8
    limited, state = run(weight, [none, full], **options)
    free, _ = run(weight, [none, full], gamma=None, **options)
    assert torch.equal(limited, free)
    assert float(state["outside"]) > 1
    more = 10 * full - 9 * full @ state["basis"] @ state["basis"].mT  # from here on the limiter is at work
    _, later = run(weight, [none, full, more], **options)
    assert float(later["outside"]) == pytest.approx(1.01 * float(state["outside"]), rel=1e-6)


def test_what_galore_never_learns_is_learned_within_one_basis():
    """A matrix of full rank is fitted although the basis, of rank 2, is never refreshed."""
    target = gradients((16, 12), 1)[0]

    def fit(kind) -> float:
        weight = nn.Parameter(torch.zeros_like(target))
        optimizer = kind([weight], lr=0.02, rank=2, scale=1.0, update_interval=10_000)
        for _ in range(400):
            loss = (weight - target).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach() / target.square().sum())

    assert fit(GaLoreAdamW) > 0.5
    assert fit(FiraAdamW) < 0.05


def test_the_state_is_galores_and_a_number():
    weight, stream = torch.zeros(40, 24), [g.float() for g in gradients((40, 24), 2)]
    (_, state), (_, galore) = (run(weight, stream, kind, rank=4) for kind in (FiraAdamW, GaLoreAdamW))
    assert state.keys() - galore.keys() == {"outside"}
    assert state["outside"].shape == ()
    assert all(state[name].shape == value.shape for name, value in galore.items())
    update, _ = run(weight, stream[:1], rank=4)
    assert int(torch.linalg.matrix_rank(update)) == 24


def test_a_gradient_of_zeros_and_dead_inputs_are_no_error():
    found, _ = run(torch.ones(30, 20), [torch.zeros(30, 20)] * 2, rank=3, update_interval=1)
    assert torch.equal(found, torch.ones(30, 20))
    gradient = gradients((30, 20), 1)[0]
    gradient[3] = 0
    found, _ = run(torch.ones(30, 20, dtype=torch.float64), [gradient] * 3, rank=3)
    assert bool(found.isfinite().all())
    assert bool((found[3] == 1).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.9}, "gamma must be at least 1"),
        ({"norm": "row"}, "norm must be one of column, matrix"),
        ({"residual": "code"}, "residual must be one of paper, reference"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FiraAdamW([nn.Parameter(torch.zeros(4, 4))], rank=2, **options)
