"""Q-GaLore against a plain double precision twin: its bases of four bits, and when they are refreshed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eckart.optim import GaLoreAdamW8bit, QGaLoreAdamW, QGaLoreAdamW32bit, optimizer_class
from eckart.optim.contract import Step
from eckart.optim.q_galore import QGaLore, packed, similarity, unpacked
from optimizer_runs import gradients


def run(stream: list[torch.Tensor], kind=QGaLoreAdamW, **options):
    parameter = nn.Parameter(torch.ones_like(stream[0]))
    optimizer = kind([parameter], **{"lr": 0.1, "rank": 3, "stagger": False, **options})
    seen = []
    for gradient in stream:
        parameter.grad = gradient.clone()
        optimizer.step()
        seen.append(optimizer.state[parameter].get("refreshes", torch.zeros(())).item())
    return parameter.detach(), optimizer.state[parameter], seen


def four_bits(q: torch.Tensor) -> torch.Tensor:
    """Every group by itself: the 16 levels of an interval that contains 0, 0 one of them."""
    out = torch.zeros_like(q)
    for column in range(q.shape[1]):
        for start in range(0, q.shape[0], 256):
            group = q[start : start + 256, column]
            low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
            if low == high:
                continue
            scale = float(torch.tensor((high - low) / 15, dtype=torch.float32))
            zero = round(-low / scale)
            codes = [min(max(round(float(x) / scale + zero), 0), 15) for x in group]
            out[start : start + 256, column] = torch.tensor([scale * (code - zero) for code in codes], dtype=q.dtype)
    return out


def twin(stream, basis, lr=0.1, scale=0.25, betas=(0.9, 0.999), eps=1e-6):
    """One interval of the algorithm, with moments of 32 bits and whatever basis."""
    weight = torch.ones_like(stream[0])
    left = weight.shape[0] < weight.shape[1]
    first = second = 0.0
    for t, gradient in enumerate(stream, start=1):
        low = basis.mT @ gradient if left else gradient @ basis
        first = betas[0] * first + (1 - betas[0]) * low
        second = betas[1] * second + (1 - betas[1]) * low**2
        n = first / (1 - betas[0] ** t) / ((second / (1 - betas[1] ** t)).sqrt() + eps)
        weight = weight - lr * scale * (basis @ n if left else n @ basis.mT)
    return weight


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (310, 301)])
def test_it_is_the_algorithm_of_the_paper(shape):
    stream = gradients(shape, 4)
    found, state, _ = run(stream, QGaLoreAdamW32bit, refresh="svd")
    u, _, vh = torch.linalg.svd(stream[0], full_matrices=False)
    exact = u[:, :3] if shape[0] < shape[1] else vh[:3].mT
    # Which sign a singular vector has is a convention, but the levels for it are not those for its negative.
    signs = (unpacked(state, min(shape), torch.float64) * exact).sum(0).sign()
    assert torch.allclose(found, twin(stream, four_bits(exact * signs)), atol=1e-10)
    assert not torch.allclose(found, twin(stream, exact), atol=1e-3)


@pytest.mark.parametrize("rows", [1, 255, 256, 301])
def test_four_bits_are_within_half_a_level_and_packed(rows):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(rows, 5, generator=generator)
    q[:, 1] = q[:, 1].abs() + 1  # of one sign, far from 0
    q[:, 2] = -q[:, 1]
    q[:, 3] = 0
    state = packed(q)
    assert state["basis"].nbytes == 5 * -(-rows // 2)
    found = unpacked(state, rows)
    assert torch.equal(found, four_bits(q.double()).float())
    levels = state["basis_scale"].repeat_interleave(256, dim=1)[:, :rows].mT
    assert bool(((found - q).abs() <= levels / 2 * (1 + 1e-5)).all())
    again = packed(found)
    assert torch.allclose(unpacked(again, rows), found, rtol=1e-5, atol=1e-7)


def test_an_orthonormal_basis_of_four_bits_is_nearly_one():
    q, _ = torch.linalg.qr(torch.randn(512, 128, generator=torch.Generator().manual_seed(0)))
    found = unpacked(packed(q), 512)
    assert 0.02 < float((found - q).norm() / q.norm()) < 0.15
    assert float(torch.linalg.matrix_norm(found.mT @ found - torch.eye(128), ord=2)) < 0.3


def test_without_its_own_parts_it_is_galore():
    stream = [g.float() for g in gradients((40, 24), 9)]
    options = {"rank": 4, "update_interval": 2}
    for stagger in (False, True):
        expected, state, _ = run(stream, GaLoreAdamW8bit, **options, stagger=stagger)
        found, own, _ = run(stream, basis_bits=32, threshold=1.1, **options, stagger=stagger)
        assert torch.equal(found, expected)
        assert all(torch.equal(own[name], value) for name, value in state.items())


def test_matrices_take_turns_as_in_galore():
    parameters = [nn.Parameter(torch.ones(9, 8)) for _ in range(4)]
    optimizer = QGaLoreAdamW(parameters, rank=3, update_interval=5, threshold=1.1)
    turns = [[] for _ in parameters]
    for number in range(1, 17):
        for gradient, parameter in zip(gradients((9, 8), 4), parameters, strict=True):
            parameter.grad = gradient.float()
        before = [int(optimizer.state[p].get("refreshes", 0)) for p in parameters]
        optimizer.step()
        for turn, parameter, count in zip(turns, parameters, before, strict=True):
            if int(optimizer.state[parameter]["refreshes"]) > count:
                turn.append(number)
    assert turns[0] == [1, 6, 11, 16]
    assert all(turn[0] == 1 and turn[2] - turn[1] == 5 for turn in turns)
    assert len({turn[1] for turn in turns}) == 4


def test_the_interval_of_a_settled_basis_doubles_from_the_sixth_refresh_on():
    stream = gradients((12, 7), 1) * 70
    _, state, seen = run(stream, update_interval=2, refresh="svd")
    turns = [number for number, count in enumerate(seen, start=1) if number == 1 or count > seen[number - 2]]
    assert turns == [1, 3, 5, 7, 9, 11, 15, 23, 39]
    assert int(state["interval"]) == 32
    assert int(state["due"]) == 71
    assert torch.allclose(state["similar"], torch.ones(5), atol=0.05)


@pytest.mark.parametrize("kind", ["leading", "subspace"])
def test_the_interval_of_a_drifting_basis_stays(kind):
    generator = torch.Generator().manual_seed(0)
    stream = [torch.randn(120, 3, generator=generator) @ torch.randn(3, 100, generator=generator) for _ in range(40)]
    _, state, seen = run(stream, update_interval=2, similarity=kind, refresh="svd")
    assert int(state["interval"]) == 2
    assert seen[-1] == 20


def test_leading_and_subspace_similarity():
    q, _ = torch.linalg.qr(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)))
    one, other = q[:, :4], q[:, [4, 1, 2, 3]]
    assert float(similarity(one, one)) == pytest.approx(1, abs=1e-5)
    assert float(similarity(one, -one)) == pytest.approx(1, abs=1e-5)
    assert float(similarity(one, other)) == pytest.approx(0, abs=1e-5)
    assert float(similarity(one, other, "subspace")) == pytest.approx(0.75, abs=1e-5)


def test_the_interval_grows_while_the_last_few_bases_were_alike():
    q, _ = torch.linalg.qr(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)))
    one, other = q[:, :4], q[:, 4:]
    method = QGaLore(rank=4, update_interval=10, threshold=0.5, stagger=False)
    state, intervals, due = method.allocate_basis(torch.zeros(30, 4)), [], []
    for number, (old, fresh) in enumerate([(None, one), *[(one, one)] * 5, *[(one, other)] * 4], start=1):
        method.schedule(old, fresh, state, Step(number))
        intervals.append(int(state["interval"]))
        due.append(int(state["due"]))
    # The mean of five is 1 at the sixth, 0.8 and 0.6 at the next two, then below 0.5.
    assert intervals == [10, 10, 10, 10, 10, 20, 40, 80, 80, 80]
    assert due == [number + interval for number, interval in enumerate(intervals, start=1)]


def test_the_state_takes_what_the_paper_says():
    stream = [g.float() for g in gradients((300, 280), 2)]
    _, state, _ = run(stream, rank=16)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == {
        "step": (torch.float32, ()),
        "basis": (torch.uint8, (16, 140)),
        "basis_scale": (torch.float32, (16, 2)),
        "basis_zero": (torch.uint8, (16, 2)),
        "due": (torch.int64, ()),
        "interval": (torch.int64, ()),
        "refreshes": (torch.int64, ()),
        "similar": (torch.float32, (5,)),
        "first": (torch.int8, (300, 16)),
        "first_scale": (torch.float32, (300, 1)),
        "second": (torch.uint8, (300, 16)),
        "second_scale": (torch.float32, (300, 1)),
    }


def test_the_classes_of_a_name():
    assert optimizer_class("q-galore") is optimizer_class("q-galore", bits=8) is QGaLoreAdamW
    assert optimizer_class("q-galore", bits=32) is QGaLoreAdamW32bit
    assert optimizer_class("galore", bits=8) is GaLoreAdamW8bit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis_bits": 8}, "basis_bits must be 4 or 32"),
        ({"similarity": "both"}, "similarity must be one of leading, subspace"),
        ({"queue_size": 0}, "queue_size must be positive"),
        ({"growth": 0}, "growth must be positive"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QGaLoreAdamW([nn.Parameter(torch.zeros(12, 7))], rank=3, **options)
