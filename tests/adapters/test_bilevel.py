"""Two levels: the split of the data, the order in which it comes, and the gradient through the lower step."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from eckart.adapters.bilevel import alternating_order, hypergradient, level_at, split_indices


@pytest.mark.parametrize("labels", [10, 101, [0] * 13 + [1] * 40 + [2] * 7, ["b", "a"] * 25])
@pytest.mark.parametrize("fraction", [0.5, 0.8, 0.83])
def test_a_split_is_disjoint_whole_and_fair_to_every_label(labels, fraction):
    values = [0] * labels if isinstance(labels, int) else labels
    lower, upper = split_indices(labels, fraction, seed=3)
    assert sorted(lower + upper) == list(range(len(values)))
    assert abs(len(lower) - fraction * len(values)) <= 0.5
    every, part = Counter(values), Counter(values[index] for index in lower)
    assert all(abs(part[label] - fraction * count) <= 1 for label, count in every.items())
    assert split_indices(labels, fraction, seed=3) == (lower, upper)
    assert split_indices(labels, fraction, seed=4) != (lower, upper)


def test_a_part_without_examples_is_refused():
    with pytest.raises(ValueError, match="leaves one of two parts empty; give more examples"):
        split_indices(2, 0.8)
    with pytest.raises(ValueError, match="both parts need examples, not 2 and 0"):
        alternating_order([0, 1], [], 1, 1, 1, steps=2)


@pytest.mark.parametrize(("lower_steps", "upper_steps"), [(1, 1), (3, 2)])
def test_each_level_reads_its_part_only_and_all_of_it(lower_steps, upper_steps):
    lower, upper = [0, 2, 4, 6, 8, 10, 12], [1, 3, 5]
    order = alternating_order(lower, upper, lower_steps, upper_steps, batch_size=4, steps=40, seed=1)
    assert len(order) == 160
    read: dict[str, list[int]] = {"lower": [], "upper": []}
    for step in range(40):
        inside = step % (lower_steps + upper_steps) < lower_steps
        assert level_at(step, lower_steps, upper_steps) == ("lower" if inside else "upper")
        read["lower" if inside else "upper"] += order[4 * step : 4 * step + 4]
    for part, seen in ((lower, read["lower"]), (upper, read["upper"])):
        passes = [seen[i : i + len(part)] for i in range(0, len(seen) - len(part) + 1, len(part))]
        assert all(sorted(once) == part for once in passes)
        assert len({tuple(once) for once in passes}) > 1  # each time in another order
    longer = alternating_order(lower, upper, lower_steps, upper_steps, batch_size=4, steps=55, seed=1)
    assert longer[:160] == order  # a run that goes on has seen the same


def toy():
    """Two layers, x -> W_2 diag(e) tanh(W_1 x), on two sets of data, in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inner, outer = [draw(5, 3), draw(2, 5)], [draw(5), draw(1)]
    data = [(draw(8, 3), draw(8, 2)) for _ in range(2)]

    def loss(part):
        def of(v, e):
            x, y = data[part]
            return (torch.tanh(x @ v[0].mT) * e[0] @ v[1].mT - y).square().mean() + (e[1] * v[0].sum()) ** 2 / 50

        return of

    return loss(0), loss(1), inner, outer


@pytest.mark.parametrize("xi", [0.0, 0.05, 0.3])
def test_the_hypergradient_is_that_of_double_backward(xi):
    lower, upper, inner, outer = toy()
    copies = [part.clone() for part in (*inner, *outer)]
    found = hypergradient(lower, upper, inner, outer, xi)
    v, e = ([part.clone().requires_grad_() for part in parts] for parts in (inner, outer))
    steps = torch.autograd.grad(lower(v, e), v, create_graph=True)
    exact = torch.autograd.grad(upper([p - xi * g for p, g in zip(v, steps, strict=True)], e), e)
    size = torch.cat(exact).norm()
    assert (torch.cat(found) - torch.cat(exact)).norm() < 1e-3 * size
    moved = [(p - xi * g).detach() for p, g in zip(v, steps, strict=True)]
    first_order = torch.cat(torch.autograd.grad(upper(moved, e), e))
    assert bool((torch.cat(found) - first_order).norm() > 0.02 * size) is (xi > 0)
    assert all(torch.equal(part, copy) for part, copy in zip((*inner, *outer), copies, strict=True))
    assert not any(part.requires_grad for part in (*inner, *outer))


def test_an_upper_loss_without_the_lower_variables_has_no_second_term():
    lower, _, inner, outer = toy()
    found = hypergradient(lower, lambda v, e: e[0].square().sum(), inner, outer, xi=0.1)
    assert torch.equal(found[0], 2 * outer[0])
    assert torch.equal(found[1], torch.zeros(1))
