"""DCT-AdamW against a plain double precision twin with a whole cosine matrix, and what the paper says of the choice."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from eckart.linalg import dct_matrix
from eckart.optim import DCTAdamW, DCTAdamW8bit
from eckart.optim.contract import Step
from eckart.optim.dct_adamw import DCTProjection, select_columns
from optimizer_runs import gradients, run_stream

SHAPES = [(12, 7), (7, 12), (9, 9)]


def run(weight: torch.Tensor, stream: list[torch.Tensor], kind=DCTAdamW, **options):
    return run_stream(kind, weight, stream, **options)


def basis(k: int, transform: str = "dct3") -> torch.Tensor:
    q = torch.tensor(
        [[math.sqrt(2 / k) * math.cos(math.pi * i * (2 * j + 1) / (2 * k)) for j in range(k)] for i in range(k)],
        dtype=torch.float64,
    )
    q[0] *= math.sqrt(0.5)
    return q if transform == "dct3" else q.mT


def twin(weight, stream, rank, lr, interval=1, norm=1, transform="dct3", feedback=False, betas=(0.9, 0.999), eps=1e-8):
    """The algorithm of the paper with moments of all coordinates, those of columns not selected being 0."""
    left = weight.shape[0] < weight.shape[1]
    weight = (weight.mT if left else weight).clone()
    q = basis(weight.shape[1], transform)
    first, second, error = torch.zeros_like(weight), torch.zeros_like(weight), torch.zeros_like(weight)
    for t, gradient in enumerate(stream, start=1):
        a = (gradient.mT if left else gradient) + error
        s = a @ q
        if (t - 1) % interval == 0:
            mask = torch.zeros(len(q), dtype=torch.float64)
            mask[torch.linalg.vector_norm(s, ord=norm, dim=0).argsort(descending=True)[:rank]] = 1
            first, second = first * mask, second * mask
        low = s * mask
        error = a - low @ q.mT if feedback else error
        first = betas[0] * first + (1 - betas[0]) * low
        second = betas[1] * second + (1 - betas[1]) * low**2
        root = math.sqrt(1 - betas[1] ** t)
        n = first / (second.sqrt() + eps * root) * mask
        weight = weight - lr * root / (1 - betas[0] ** t) * n @ q.mT
    return weight.mT if left else weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("norm", "interval"), [(1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("transform", ["dct3", "dct2"])
@pytest.mark.parametrize("feedback", [False, True])
def test_it_is_the_algorithm_of_the_paper(shape, norm, interval, transform, feedback):
    stream, weight = gradients(shape, 8), gradients(shape, 1)[0]
    found, _ = run(
        weight, stream, rank=3, lr=0.1, norm=norm, update_interval=interval, transform=transform,
        error_feedback=feedback,
    )  # fmt: skip
    expected = twin(weight, stream, 3, 0.1, interval, norm, transform, feedback)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
@pytest.mark.parametrize("transform", ["dct3", "dct2"])
def test_the_columns_are_those_of_the_orthogonal_cosine_matrix(size, transform):
    method = DCTProjection(rank=2, transform=transform)
    q = method.columns(torch.arange(size, dtype=torch.int32), size, torch.float64)
    assert torch.allclose(q, basis(size, transform), rtol=0, atol=1e-13)
    assert torch.allclose(q.mT @ q, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    a = gradients((5, size), 1)[0]
    assert torch.allclose(method.coordinates(a), a @ q, rtol=0, atol=1e-13)
    assert torch.allclose(method.coordinates(a.float()), (a @ q).float(), atol=1e-5)


def test_no_other_columns_leave_less_and_the_rest_is_what_was_not_selected():
    a = gradients((6, 8), 1)[0]
    s = a @ basis(8)
    chosen = select_columns(s, 3, norm=2)

    def left_out(columns) -> float:
        q = basis(8)[:, list(columns)]
        return float((a - a @ q @ q.mT).square().sum())

    every = [left_out(columns) for columns in itertools.combinations(range(8), 3)]
    dropped = [j for j in range(8) if j not in chosen.tolist()]
    assert left_out(chosen.tolist()) == pytest.approx(min(every), rel=1e-12)
    assert left_out(chosen.tolist()) == pytest.approx(float(s[:, dropped].square().sum()), rel=1e-12)
    tail = float(torch.linalg.svdvals(a)[3:].square().sum())
    assert min(every) > tail
    share = sum(every) / len(every) / float(a.square().sum())
    assert min(every) < share * float(a.square().sum()) == pytest.approx((1 - 3 / 8) * float(a.square().sum()))


def test_columns_of_a_smooth_gradient_hold_nearly_what_singular_vectors_do():
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(400, 64, generator=generator, dtype=torch.float64)
    distance = (torch.arange(64)[:, None] - torch.arange(64)).abs()
    a = white @ torch.linalg.cholesky(0.95 ** distance.double()).mT
    best = torch.linalg.svdvals(a)[:8].square().sum()

    def share(columns: torch.Tensor, transform: str) -> float:
        return float((a @ basis(64, transform)[:, columns]).square().sum() / best)

    chosen = select_columns(DCTProjection(transform="dct2").coordinates(a), 8)
    assert share(chosen, "dct2") > 0.97
    for _ in range(5):
        assert share(torch.randperm(64, generator=generator)[:8], "dct2") < 0.7


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_it_is_adam_in_a_turned_basis_without_error(shape):
    k = min(shape)
    method = DCTProjection(rank=k, error_feedback=True, eps=0.0)
    state = method.allocate(torch.zeros(shape, dtype=torch.float64))
    adam, q = method.moments(), basis(k)
    plain = adam.allocate(torch.zeros(max(shape), k, dtype=torch.float64))
    for number, gradient in enumerate(gradients(shape, 4), start=1):
        a = gradient if shape[0] >= shape[1] else gradient.mT
        found = method.direction(gradient, state, Step(number), gradient)
        expected = adam.direction(a @ q, plain, number) @ q.mT
        assert torch.allclose(found if shape[0] >= shape[1] else found.mT, expected, rtol=0, atol=1e-12)
        assert float(state["error"].abs().max()) < 1e-13


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["short", "long"])
def test_with_feedback_what_was_applied_and_what_is_kept_add_up_to_the_gradients(shape, side):
    stream, options = gradients(shape, 6), {"rank": 3, "lr": 1.0, "rule": "sgd", "betas": (0.0, 0.0), "side": side}
    weight = torch.zeros(shape, dtype=torch.float64)
    found, state = run(weight, stream, error_feedback=True, **options)
    assert torch.allclose(state["error"] - found, sum(stream), rtol=0, atol=1e-12)
    assert float(state["error"].abs().max()) > 0.1
    single, small = run(weight.float(), [g.float() for g in stream], DCTAdamW8bit, error_feedback=True, **options)
    assert small["error"].dtype == torch.int8
    without, _ = run(weight, stream, **options)
    lost = (sum(stream) + without).norm()
    assert (sum(stream) + single).norm() < 0.8 * lost


@pytest.mark.parametrize("rule", ["adamw", "adafactor", "lion"])
def test_moments_go_with_their_columns(rule):
    weight, stream = torch.zeros(12, 9, dtype=torch.float64), gradients((12, 9), 2)
    betas = (0.9, 0.95)
    _, before = run(weight, stream[:1], rank=5, rule=rule, betas=betas)
    _, after = run(weight, stream, rank=5, rule=rule, betas=betas)
    old, new = before["indices"].tolist(), after["indices"].tolist()
    assert old == sorted(old)
    assert new == sorted(new)
    assert 0 < len(set(old) & set(new)) < 5
    turn = basis(9)[:, old].mT @ basis(9)[:, new]
    assert torch.allclose(turn, turn.round(), rtol=0, atol=1e-12)
    low = stream[1] @ basis(9)[:, new]
    decay = betas[1] if rule == "lion" else betas[0]
    assert torch.allclose(after["first"], decay * before["first"] @ turn + (1 - decay) * low, rtol=0, atol=1e-12)
    if rule == "adamw":
        assert torch.allclose(after["second"], 0.95 * before["second"] @ turn + 0.05 * low**2, rtol=0, atol=1e-12)
    if rule == "adafactor":
        assert torch.allclose(
            after["columns"], 0.95 * before["columns"] @ turn + 0.05 * (low**2).mean(0), rtol=0, atol=1e-12
        )


def test_a_subspace_is_stored_as_r_integers():
    stream = [g.float() for g in gradients((40, 24), 2)]
    _, state = run(torch.zeros(40, 24), stream, rank=4)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "step": (), "indices": (4,), "first": (40, 4), "second": (40, 4),
    }  # fmt: skip
    assert state["indices"].dtype == torch.int32
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())


def test_half_precision_selects_as_double_precision_does():
    parameter = nn.Parameter(torch.zeros(300, 200, dtype=torch.bfloat16))
    gradient = (gradients((300, 200), 1)[0] * torch.linspace(1, 3, 200)).to(torch.bfloat16)
    optimizer = DCTAdamW([parameter], rank=20)
    parameter.grad = gradient.clone()
    optimizer.step()
    expected = (gradient.double() @ dct_matrix(200, dtype=torch.float64)).abs().sum(dim=0).topk(20).indices
    assert optimizer.state[parameter]["indices"].tolist() == expected.sort().values.tolist()
    assert torch.equal(parameter.grad, gradient)


def test_a_gradient_of_zeros_is_no_error():
    found, state = run(torch.ones(60, 50), [torch.zeros(60, 50)] * 2, rank=3)
    assert torch.equal(found, torch.ones(60, 50))
    assert len(set(state["indices"].tolist())) == 3


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="norm must be one of 1, 2, not 3"):
        DCTProjection(norm=3)
    with pytest.raises(ValueError, match="transform must be one of dct3, dct2"):
        DCTProjection(transform="dct4")
