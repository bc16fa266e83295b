"""GWT against a plain double precision twin, and what the paper promises of its bands, limiter and state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from eckart.optim import GWTAdamW
from eckart.optim.contract import Step
from eckart.optim.gwt import GWT
from optimizer_runs import gradients, run_stream

SHAPES = [(5, 16), (9, 13), (16, 6)]
PLAIN = {"rank": 1, "scale": 1.0, "gamma": None, "clip": None}


def run(weight: torch.Tensor, stream: list[torch.Tensor], **options):
    return run_stream(GWTAdamW, weight, stream, **options)


def haar(size: int, level: int) -> tuple[torch.Tensor, list[tuple[torch.Tensor, list[int]]]]:
    """Basis vectors of averages, and of each band of details, with the average that covers each of these."""
    averages = list(torch.eye(size, dtype=torch.float64))
    owners, bands = [[i] for i in range(size)], []
    for _ in range(level):
        pairs = len(averages) // 2
        rows = [(averages[2 * i + 1] - averages[2 * i]) / 2**0.5 for i in range(pairs)]
        covered = [owners[2 * i][0] for i in range(pairs)]
        left = slice(2 * pairs, None)
        averages = [(averages[2 * i] + averages[2 * i + 1]) / 2**0.5 for i in range(pairs)] + averages[left]
        owners = [owners[2 * i] + owners[2 * i + 1] for i in range(pairs)] + owners[left]
        bands.append((torch.stack(rows), covered))
    owner = {column: k for k, columns in enumerate(owners) for column in columns}
    return torch.stack(averages), [(rows, [owner[c] for c in covered]) for rows, covered in bands]


def twin(weight, stream, level, lr, scale, gamma=1.01, clip=3.0, bias="coarse", left=False, decay=0.0, eps=1e-6):
    """The published algorithm with basis vectors as rows of matrices; also how often the limiter and the cut acted."""
    weight = weight.mT.clone() if left else weight.clone()
    averages, bands = haar(weight.shape[1], level)
    first = second = 0.0
    before, limited, cut = None, 0, 0
    for t, gradient in enumerate(stream, start=1):
        gradient = gradient.mT if left else gradient
        coarse = gradient @ averages.mT
        first, second = 0.9 * first + 0.1 * coarse, 0.999 * second + 0.001 * coarse**2
        one, two = 1 - 0.9**t, (1 - 0.999**t) ** 0.5
        if bias == "reference":  # as the code: nothing is corrected until the step is made
            denominator, n, late = second.sqrt() + eps * two, first / (second.sqrt() + eps * two), two / one
        else:
            denominator = second.sqrt() / two + eps
            n, late = first / one / denominator, 1.0
        factor = 1.0
        if gamma is not None and before is not None:
            factor = min(1.0, float(gamma * (before + 1e-8) / n.norm()))
            limited += factor < 1
        before = n.norm() * factor
        update = factor * n @ averages
        for rows, owner in bands:
            detail = gradient @ rows.mT / denominator[:, owner]
            if clip is not None:
                bound = clip / late
                cut += int((detail.abs() > bound).sum())
                detail = detail.clamp(-bound, bound)
            update = update + factor * detail @ rows
        weight = weight * (1 - lr * decay) - lr * scale * late * update
    return (weight.mT if left else weight), limited, cut


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"gamma": None, "clip": None}, {"bias": "reference", "clip": None}, {"bias": "reference"}]
)
def test_it_is_the_published_algorithm(shape, level, options):
    weight, stream = gradients(shape, 1)[0], gradients(shape, 8)
    stream[1] = -stream[0]  # leaves little momentum, so that the next step would grow
    options = {"level": level, "lr": 0.1, "scale": 0.5, **options}
    for side, left in (("right", False), ("left", True)):
        found, _ = run(weight, stream, rank=1, side=side, weight_decay=0.2, **options)
        expected, limited, cut = twin(weight, stream, left=left, decay=0.2, **options)
        assert torch.allclose(found, expected, atol=1e-12)
        assert options.get("gamma", 1.01) is None or limited > 0
        assert options.get("clip", 3.0) is None or cut > 0


def test_without_levels_it_is_torchs_adamw_and_the_gradient_is_left_alone():
    weight, stream = gradients((5, 8), 1)[0], gradients((5, 8), 4)
    found, _ = run(weight, stream, level=0, lr=0.1, eps=1e-8, **PLAIN)
    parameter = nn.Parameter(weight.clone())
    adam = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0)
    for gradient in stream:
        parameter.grad = gradient.clone()
        adam.step()
    assert torch.allclose(found, parameter.detach(), atol=1e-12)
    for level in (0, 2):
        method, gradient = GWT(rank=1, level=level), stream[0].clone()
        method.direction(gradient, method.allocate(gradient), Step(1), weight)
        assert torch.equal(gradient, stream[0])


@pytest.mark.parametrize(
    ("size", "rank", "level"), [(768, 192, 2), (768, 193, 1), (32, 4, 3), (48, 4, 3), (1365, 341, 2), (8, 1, 3)]
)
def test_the_level_follows_the_rank(size, rank, level):
    method = GWT(rank=rank)
    assert method.transform(size).levels == level
    assert method.fits((3, size))
    state = method.allocate(torch.zeros(3, size))
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "first": (3, -(-size // 2**level)),
        "second": (3, -(-size // 2**level)),
        "norm": (),
    }
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())


def test_what_is_too_narrow_takes_the_dense_rule():
    assert not GWT(rank=5).fits((100, 8))
    assert GWT(rank=5, side="left").fits((100, 8))
    assert GWT(rank=100, level=3).fits((3, 8))
    assert not GWT(rank=1, level=4).fits((3, 8))
    assert not GWT(rank=None, level=2).fits((8, 8))
    assert not GWT(rank=1).fits((8, 8, 8))


def test_rows_that_are_constant_over_blocks_stay_so():
    stream = [g.repeat_interleave(4, dim=1) for g in gradients((5, 3), 4)]
    found, _ = run(torch.zeros(5, 12, dtype=torch.float64), stream, rank=3)
    blocks = found.unflatten(1, (3, 4))
    assert torch.allclose(blocks, blocks[..., :1].expand_as(blocks), atol=1e-12)
    assert bool((found != 0).all())


def test_the_update_is_linear_in_the_details():
    average = gradients((5, 3), 1)[0].repeat_interleave(4, dim=1)
    one, two = (g - g.unflatten(1, (3, 4)).mean(2).repeat_interleave(4, dim=1) for g in gradients((5, 12), 2, seed=5))
    method = GWT(level=2, **PLAIN)

    def update(gradient: torch.Tensor) -> torch.Tensor:
        return method.direction(gradient, method.allocate(gradient), Step(1), gradient)

    base = update(average)
    parts = 2 * (update(average + one) - base) - 3 * (update(average + two) - base)
    assert torch.allclose(update(average + 2 * one - 3 * two) - base, parts, atol=1e-9)
    assert float(parts.norm()) > 1


def test_where_neighbours_cancel_the_update_stays_bounded():
    """Signs that alternate: averages of 0, whose root of a second moment is no measure of anything."""
    gradient = torch.ones(4, 8, dtype=torch.float64)
    gradient[:, ::2] = -1
    weight = torch.zeros_like(gradient)
    cut, _ = run(weight, [gradient], level=2, lr=1.0, rank=1, scale=1.0)
    assert float(cut.abs().max()) == pytest.approx(3 / 2**0.5)
    free, _ = run(weight, [gradient], level=2, lr=1.0, rank=1, scale=1.0, clip=None)
    assert float(free.abs().max()) > 1e5


def test_averages_and_details_of_one_size_move_alike_from_the_first_step():
    """In the official code details are weighted 10 times as much in the first step."""
    gradient = torch.tensor([[1.0, 0.0, -1.0, 0.0]], dtype=torch.float64)  # (1, -1) / √2 of averages and of details
    weight = torch.zeros_like(gradient)
    for bias, ratio in (("coarse", 1.0), ("reference", 10.0)):
        found, _ = run(weight, [gradient], level=1, lr=1.0, bias=bias, **PLAIN)
        pairs = found.unflatten(1, (2, 2))
        detail, average = (pairs[..., 0] - pairs[..., 1]).abs(), pairs.sum(-1).abs()
        assert torch.allclose(detail / average, torch.full((1, 2), ratio, dtype=torch.float64), rtol=1e-5)


def test_averages_grow_by_at_most_one_per_cent_a_step():
    gradient = gradients((5, 12), 1)[0]
    stream = [1e-6 * gradient, *[gradient] * 5]
    weight, options = torch.zeros_like(gradient), {"rank": 3, "betas": (0.5, 0.999)}
    sizes = [float(run(weight, stream[:t], **options)[1]["norm"]) for t in range(1, 7)]
    free = [float(run(weight, stream[:t], gamma=1e9, **options)[1]["norm"]) for t in range(1, 7)]
    assert sizes == pytest.approx([sizes[0] * 1.01**t for t in range(6)], rel=1e-5)
    assert free[3] > 1.5 * sizes[3]


@pytest.mark.parametrize("first", [0.0, 1e-12])
def test_a_start_without_a_gradient_does_not_hold_training_down(first):
    gradient = gradients((5, 12), 1)[0]
    stream = [first * gradient, gradient]
    limited, state = run(torch.zeros_like(gradient), stream, rank=3)
    free, _ = run(torch.zeros_like(gradient), stream, rank=3, gamma=None)
    assert torch.equal(limited, free)
    assert float(state["norm"]) > 0.5 * math.sqrt(15)


def test_other_wavelets_and_eight_bits_fit_a_matrix():
    target = gradients((12, 20), 1)[0].float()
    for options in ({"wavelet": "db2"}, {"bits": 8}, {"side": "short"}, {}):
        weight = nn.Parameter(torch.zeros_like(target))
        optimizer = GWTAdamW([weight], lr=0.05, rank=4, **options)
        for _ in range(300):
            loss = (weight - target).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert float(loss.detach()) < 0.02 * float(target.square().sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "lion"}, "rule must be 'adamw'"),
        ({"level": -1}, "level must be at least 0"),
        ({"gamma": 0.5}, "gamma must be at least 1"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"wavelet": "sym4"}, "wavelet must be one of haar"),
        ({"side": "last"}, "side must be one of"),
        ({"bias": "none"}, "bias must be one of coarse, reference"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GWTAdamW([nn.Parameter(torch.zeros(4, 4))], rank=2, **options)
