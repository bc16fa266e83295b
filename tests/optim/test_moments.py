"""Moments of eight bits: how near they stay, and update rules against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eckart.optim.moments import allocate, load, store
from eckart.optim.rounding import round_stochastically
from eckart.optim.rules import rule


@pytest.mark.parametrize(("signed", "depth", "error"), [(True, 4, 0.17), (False, 8, 0.17), (True, 2, 0.06)])
def test_eight_bits_keep_small_values(signed, depth, error):
    x = torch.logspace(-depth, 0, 700)[None].repeat(3, 1)
    x = x * (torch.tensor([1.0, -1.0]).repeat(350) if signed else 1)
    state = allocate("m", x, bits=8, signed=signed)
    store(state, "m", x)
    found = load(state, "m")
    assert found.shape == x.shape
    assert float(((found - x) / x).abs().max()) < error
    assert torch.equal(found.sign(), x.sign())
    once = {name: value.clone() for name, value in state.items()}
    store(state, "m", found)  # what is stored is kept by storing it again
    assert all(torch.equal(state[name], value) for name, value in once.items())


def test_zeros_large_and_uneven_blocks():
    x = torch.zeros(4, 300)
    x[1], x[2, 299], x[3] = 1e30, 1e-30, -2.0
    state = allocate("m", x, bits=8)
    store(state, "m", x)
    assert torch.allclose(load(state, "m"), x, rtol=1e-6)
    assert "m_scale" not in allocate("m", torch.zeros(9), bits=8)


@pytest.mark.parametrize(
    ("name", "betas", "theirs"),
    [
        ("adamw", (0.8, 0.95), lambda p: torch.optim.AdamW(p, 0.1, (0.8, 0.95), eps=1e-6, weight_decay=0)),
        ("sgd", (0.7, 0.0), lambda p: torch.optim.SGD(p, 0.1, momentum=0.7)),
        ("sgd", (0.0, 0.0), lambda p: torch.optim.SGD(p, 0.1)),
    ],
)
def test_rules_are_torchs(name, betas, theirs):
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
    other, mine = theirs([parameter]), rule(name, betas, 1e-6)
    own, state = torch.zeros(5, 4, dtype=torch.float64), mine.allocate(parameter.detach())
    for number in range(1, 6):
        gradient = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.clone()
        other.step()
        own -= 0.1 * mine.direction(gradient, state, number)
    assert torch.allclose(own, parameter.detach(), atol=1e-12)


def test_lion_and_adafactor_by_hand():
    first, second = torch.tensor([[1.0, -2.0], [0.5, 0.1]]), torch.tensor([[-1.0, 1.0], [0.5, -3.0]])
    lion = rule("lion", (0.9, 0.99), 0.0)
    state = lion.allocate(first)
    lion.direction(first, state, 1)
    assert torch.equal(lion.direction(second, state, 2), (0.9 * 0.01 * first + 0.1 * second).sign())
    factored = rule("adafactor", (0.0, 0.5), 0.0)
    state = factored.allocate(first)
    factored.direction(first, state, 1)
    found = factored.direction(second, state, 2)
    squares = (0.25 * first**2 + 0.5 * second**2) / 0.75
    outer = squares.mean(1, keepdim=True) * squares.mean(0) / squares.mean()
    assert torch.allclose(found, second / outer.sqrt(), rtol=1e-6)
    assert sum(value.numel() for value in state.values()) == 4 + 2 + 2


def test_random_rounding_is_unbiased_and_leaves_what_needs_none():
    x = torch.tensor([1.0, 1 + 2**-9, -3.14159, 1e-20, float("inf"), 0.0])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([round_stochastically(x, generator).double() for _ in range(4000)])
    assert drawn.dtype == torch.float64
    assert torch.allclose(drawn[:, 1:4].mean(0), x[1:4].double(), rtol=3e-4)
    assert torch.equal(drawn[:, [0, 4, 5]].float().unique(dim=0)[0], x[[0, 4, 5]])
    assert all(len(column.unique()) <= 2 for column in drawn.mT)
