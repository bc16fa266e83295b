"""GaLore+ against a plain double precision twin, GaLore and Adam, and how it finds heads and entries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny_models
from eckart.optim import GaLoreAdamW, GaLorePlusAdamW, GaLorePlusAdamW8bit, head_groups, low_rank_groups
from eckart.optim.contract import Step
from eckart.optim.galore_plus import GaLorePlus, running_top
from optimizer_runs import gradients

D = 4  # width of a head


def run(stream: list[torch.Tensor], kind=GaLorePlusAdamW, **options):
    parameter = nn.Parameter(torch.ones_like(stream[0]))
    optimizer = kind([parameter], **{"lr": 0.1, "refresh": "svd", "stagger": False, **options})
    for gradient in stream:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


def drawn(heads: int, count: int, number: int) -> list[int]:
    """The heads that the first parameter of seed 0 draws in a step."""
    return torch.randperm(heads, generator=Step(number).generator())[:count].tolist()


def twin(stream, side, rank, density, warmup, lr=0.1, scale=0.25, betas=(0.9, 0.999), eps=1e-6):
    """The algorithm with dense sums and residual moments that are added to the low-rank ones; one refresh."""
    turn = (lambda x: x.mT) if side == "left" else (lambda x: x)
    weight = torch.ones_like(turn(stream[0]))
    first = second = residual = squares = 0.0
    missed = torch.zeros_like(weight)
    for t, gradient in enumerate(stream, start=1):
        a = turn(gradient)
        if t == 1:
            chosen = sorted(drawn(a.shape[0] // D, -(-rank // D), 1))
            block = torch.cat([a[head * D : (head + 1) * D] for head in chosen])
            basis = torch.linalg.svd(block, full_matrices=False)[2][:rank].mT
        low = a @ basis
        first = betas[0] * first + (1 - betas[0]) * low
        second = betas[1] * second + (1 - betas[1]) * low**2
        n = first / (1 - betas[0] ** t) / ((second / (1 - betas[1] ** t)).sqrt() + eps)
        update = n @ basis.mT
        left = a - low @ basis.mT
        if t <= warmup:
            missed += left.abs()
            mask = torch.zeros(missed.numel()).index_fill(0, missed.flatten().topk(round(density * a.numel()))[1], 1.0)
            mask = mask.reshape(missed.shape).bool()
            since = first * 0  # low-rank momentum of the time after the warm-up
        else:
            s = t - warmup
            since = betas[0] * since + (1 - betas[0]) * low
            residual = betas[0] * residual + (1 - betas[0]) * left
            squares = betas[1] * squares + (1 - betas[1]) * a**2
            whole = (since @ basis.mT + residual) / (1 - betas[0] ** s)
            own = whole / ((squares / (1 - betas[1] ** s)).sqrt() + eps)
            update = torch.where(mask, own, update)
        weight = weight - lr * scale * update
    return turn(weight)


@pytest.mark.parametrize(("side", "shape"), [("right", (20, 9)), ("right", (12, 30)), ("left", (9, 20))])
@pytest.mark.parametrize("rank", [3, 7])  # of one head, of two
def test_it_is_the_algorithm(side, shape, rank):
    stream = gradients(shape, 6)
    found, _ = run(stream, rank=rank, side=side, head_dim=D, density=0.1, warmup=1, update_interval=9)
    assert torch.allclose(found, twin(stream, side, rank, 0.1, 1), atol=1e-10)


def test_one_head_without_entries_is_galore():
    stream = gradients((12, 7), 6)
    options = {"rank": 3, "update_interval": 2, "side": "right"}
    expected, state = run(stream, GaLoreAdamW, **options)
    for head_dim in (None, 12):
        found, own = run(stream, head_dim=head_dim, density=0.0, **options)
        assert torch.equal(found, expected)
        assert own.keys() == state.keys()
    assert not torch.equal(run(stream, head_dim=D, density=0.0, **options)[0], expected)


def test_all_entries_are_adam_through_every_refresh():
    stream = gradients((12, 7), 9)
    options = {"rank": 3, "side": "right", "head_dim": D, "scale": 1.0, "update_interval": 2}
    before, _ = run(stream[:3], density=1.0, warmup=3, **options)
    after, _ = run(stream, density=1.0, warmup=3, **options)
    parameter = nn.Parameter(before.clone())
    adam = torch.optim.AdamW([parameter], lr=0.1, eps=1e-6, weight_decay=0.0)
    for gradient in stream[3:]:
        parameter.grad = gradient.clone()
        adam.step()
    assert torch.allclose(after, parameter.detach(), atol=1e-12)


def test_the_state_is_galores_and_three_numbers_an_entry():
    stream = [g.float() for g in gradients((40, 24), 3)]
    for kind in (GaLorePlusAdamW, GaLorePlusAdamW8bit):
        _, state = run(stream, kind, rank=4, side="right", head_dim=8, density=0.05, warmup=2)
        single = {name: value for name, value in state.items() if name.startswith("entries")}
        assert {name: (value.numel(), value.dtype) for name, value in single.items()} == {
            "entries": (48, torch.int64), "entries_first": (48, torch.float32), "entries_second": (48, torch.float32)
        }  # fmt: skip
        assert state.keys() - single.keys() == run(stream, kind, rank=4, density=0.0)[1].keys()
        assert bool((state["entries"].diff() > 0).all())
        assert state["first"].dtype == (torch.float32 if kind is GaLorePlusAdamW else torch.int8)


def test_a_shared_row_space_is_found_from_any_head():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 60, generator=generator)
    a = torch.randn(40, 3, generator=generator) @ rows
    for refresh in ("svd", "warm"):
        for number in range(1, 5):
            method = GaLorePlus(rank=3, side="right", head_dim=8, refresh=refresh)
            basis, low = method.fresh_basis(a, None, Step(number))
            assert torch.allclose(basis.mT @ basis, torch.eye(3), atol=1e-5)
            assert torch.allclose(low @ basis.mT, a, atol=1e-4)


def test_no_shared_basis_beats_that_of_the_whole_matrix():
    a = gradients((40, 30), 1)[0]

    def error(**options) -> float:
        basis, low = GaLorePlus(rank=6, side="right", refresh="svd", **options).fresh_basis(a, None, Step(1))
        return float((a - low @ basis.mT).square().sum())

    assert error(head_dim=8) > error() == pytest.approx(float(torch.linalg.svdvals(a)[6:].square().sum()))


@pytest.mark.parametrize("spread", [0.25, 1.0])
def test_candidates_have_nearly_the_largest_sums(spread):
    generator = torch.Generator().manual_seed(0)
    size = torch.exp(spread * torch.randn(80, 100, generator=generator))
    index, scores, total = torch.zeros(100, dtype=torch.int64), torch.zeros(100), torch.zeros(80, 100)
    shares = []
    for _ in range(10):
        new = size * torch.randn(80, 100, generator=generator).abs()
        total += new
        running_top(new.clone(), index, scores)
        flat = total.flatten()
        shares.append(float(flat[index].sum() / flat.topk(100).values.sum()))
        assert len(index.unique()) == 100
    assert shares[0] == pytest.approx(1)  # of one matrix they are the largest
    assert shares[-1] > 0.88


def test_candidates_of_the_same_matrix_again_are_its_largest_and_sums():
    new = torch.rand(9, 8, generator=torch.Generator().manual_seed(0))
    index, scores = torch.zeros(5, dtype=torch.int64), torch.zeros(5)
    for _ in range(4):
        running_top(new.clone(), index, scores)
    assert torch.equal(index, new.flatten().topk(5).indices)
    assert torch.allclose(scores, 4 * new.flatten().topk(5).values)


def test_a_warm_up_that_is_interrupted_goes_on():
    stream = [g.float() for g in gradients((12, 7), 8)]
    options = {"rank": 3, "side": "right", "head_dim": D, "density": 0.1, "warmup": 5}
    expected, _ = run(stream, **options)
    parameter = nn.Parameter(torch.ones(12, 7))
    saved = None
    for part in (stream[:3], stream[3:]):
        optimizer = GaLorePlusAdamW([parameter], lr=0.1, refresh="svd", stagger=False, **options)
        if saved is not None:
            optimizer.load_state_dict(saved)
        for gradient in part:
            parameter.grad = gradient.clone()
            optimizer.step()
        saved = optimizer.state_dict()
    assert torch.equal(parameter.detach(), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.5}, "density must be from 0 to 1"),
        ({"warmup": 0}, "warmup must be positive"),
        ({"head_dim": 4}, "head_dim needs side='right'"),
        ({"head_dim": 5, "side": "right"}, r"parameter 0 has 12 rows, no whole number of heads of 5.*head_groups"),
        ({"head_dim": 5, "side": "left"}, r"parameter 0 has 7 columns"),
        ({"rule": "sgd", "betas": (0.0, 0.0)}, "without momentum"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GaLorePlusAdamW([nn.Parameter(torch.zeros(12, 7))], rank=3, **options)


def test_groups_mark_the_heads_of_attention():
    model = tiny_models.FAMILIES["llama"]()
    groups = head_groups(model, rank=4, weight_decay=0.1)
    ends = [
        (group.get("side"), group.get("head_dim"), {name.split(".")[-2] for name, _ in group["params"]})
        for group in groups[:3]
    ]
    assert ends == [
        ("right", 8, {"q_proj", "k_proj", "v_proj"}),
        ("left", 8, {"o_proj"}),
        (None, None, {"gate_proj", "up_proj", "down_proj"}),
    ]
    plain = low_rank_groups(model, rank=4, weight_decay=0.1)
    assert [group["params"] for group in groups[3:]] == [group["params"] for group in plain[1:]]
    assert sum(len(group["params"]) for group in groups[:3]) == len(plain[0]["params"])
    assert all(group["rank"] == 4 and group["weight_decay"] == 0.1 for group in groups[:3])
    values = head_groups(model, rank=4, roles=["value"])
    assert {name.split(".")[-2] for name, _ in values[0]["params"]} == {"v_proj"}
    with pytest.raises(ValueError, match="no projected matrix is query of attention alone"):
        head_groups(tiny_models.FAMILIES["gpt2"](), rank=4, roles=["query"])

    optimizer = GaLorePlusAdamW(groups, lr=0.01, warmup=3)
    ids = torch.arange(48).reshape(4, 12) * 7 % 60
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
