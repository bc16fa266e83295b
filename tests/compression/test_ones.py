from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import tiny_models
from eckart.compression import compress
from eckart.compression.contract import Job
from eckart.compression.ones import OneS, mixed, top_channels, truncated
from eckart.models import save
from eckart.models.experts import Expert, expert_banks, route
from eckart.structures import EckartWarning
from mixtures import FAMILIES, batches, build, make_permuted_copies
from model_state import assert_unchanged, snapshot

GATHERS = ["sum", "mean", "top", "svd"]
every_gather = pytest.mark.parametrize("gather", GATHERS)
mixtures = pytest.mark.parametrize("family", FAMILIES)
TWINS = {"mixtral": "MistralForCausalLM", "qwen3_moe": "Qwen3ForCausalLM"}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some(count: int, width: int = 6, hidden: int = 5) -> list[Expert]:
    return [
        Expert(
            normal(width, hidden, seed=3 * i),
            normal(width, hidden, seed=3 * i + 1),
            normal(hidden, width, seed=3 * i + 2),
        )
        for i in range(count)
    ]


def output(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.silu(x @ expert.gate.mT) * (x @ expert.up.mT)) @ expert.down.mT


def run(model: Any, gather: str = "svd", ratio: float = 0.2, steps: int = 0, **options: Any) -> Any:
    data = options.pop("data", None) or batches(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        return compress(model, "ones", ratio=ratio, data=data, progress=False, gather=gather, steps=steps, **options)


# ------------------------------------------------------------------------------------------------------ gathering


def test_one_expert_is_gathered_unchanged_by_every_way():
    (expert,) = some(1)
    one = torch.ones(1).double()
    for found in (mixed([expert], one), mixed([truncated(expert, 5)], one), top_channels([expert], one)[0]):
        for got, was in zip(found, expert, strict=True):
            torch.testing.assert_close(got, was, rtol=0, atol=1e-12)


def test_of_identical_experts_the_mean_and_the_channels_are_the_expert_and_the_sum_is_a_multiple():
    (expert,) = some(1)
    copies, usage = [expert] * 4, torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    for got, was in zip(mixed(copies, usage), expert, strict=True):
        torch.testing.assert_close(got, was, rtol=0, atol=1e-12)
    for got, was in zip(mixed(copies, 4 * usage), expert, strict=True):
        torch.testing.assert_close(got, 4 * was, rtol=0, atol=1e-12)
    gathered, kept = top_channels(copies, usage)
    assert kept.all()
    x = normal(9, 5, seed=99)
    torch.testing.assert_close(output(gathered, x), output(expert, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_each_term_of_the_svd_is_the_best_of_its_rank_and_full_rank_is_the_sum(rank):
    experts = some(3)
    for expert in experts:
        for got, was in zip(truncated(expert, rank), expert, strict=True):
            s = np.linalg.svd(was.numpy(), compute_uv=False)
            assert float((was - got).norm()) == pytest.approx(np.linalg.norm(s[rank:]), rel=1e-10)
            assert np.linalg.matrix_rank(got.numpy()) == rank
    ones = torch.ones(3).double()
    gathered = mixed([truncated(expert, rank) for expert in experts], ones)
    assert all(np.linalg.matrix_rank(w.numpy()) <= min(3 * rank, 5) for w in gathered)
    full = mixed([truncated(expert, 5) for expert in experts], ones)
    for got, *parts in zip(full, *experts, strict=True):
        torch.testing.assert_close(got, sum(parts), rtol=0, atol=1e-12)


@pytest.mark.parametrize("usage", [[0.25] * 4, [0.5, 0.3, 0.2, 0.0], [1.0, 0.0, 0.0, 0.0], [0.4, 0.35, 0.15, 0.1]])
def test_each_channel_is_one_teacher_channel_and_the_best_of_its_expert(usage):
    experts, u = some(4), torch.tensor(usage, dtype=torch.float64)
    gathered, kept = top_channels(experts, u)
    assert gathered.gate.shape == (6, 5)
    assert kept.sum() == 6
    x = normal(9, 5, seed=99)
    found = 0
    for e, i in kept.nonzero().tolist():
        row = [j for j in range(6) if torch.equal(gathered.gate[j], experts[e].gate[i])]
        assert len(row) == 1
        torch.testing.assert_close(x @ gathered.up[row[0]], x @ experts[e].up[i], rtol=0, atol=1e-12)
        torch.testing.assert_close(gathered.down[:, row[0]], usage[e] * experts[e].down[:, i], rtol=0, atol=1e-12)
        found += 1
    assert found == 6
    for e, expert in enumerate(experts):
        rows = torch.cat((expert.gate, expert.up), 1)
        importance = rows.norm(dim=1) * expert.down.norm(dim=0)
        if 0 < kept[e].sum() < 6:
            assert importance[kept[e]].min() > importance[~kept[e]].max()
        assert abs(float(kept[e].sum()) - 6 * usage[e]) < 1


def test_a_channel_that_two_experts_share_is_taken_once_with_both_down_columns():
    one, other = some(2)
    gate, up = other.gate.clone(), other.up.clone()
    gate[4], up[4] = 9 * one.gate[2], 9 * one.up[2]  # the most important of its expert ...
    one.gate[2], one.up[2] = gate[4], up[4]  # ... and of the other
    other = Expert(gate, up, other.down)
    gathered, kept = top_channels([one, other], torch.tensor([0.6, 0.4], dtype=torch.float64))
    assert kept[0, 2]
    assert kept[1, 4]
    assert kept.sum() == 7  # six places, one of which stands for two
    (row,) = [j for j in range(6) if torch.equal(gathered.gate[j], gate[4])]
    torch.testing.assert_close(gathered.down[:, row], 0.6 * one.down[:, 2] + 0.4 * other.down[:, 4], rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- whole models


@mixtures
@every_gather
def test_a_mixture_of_one_expert_becomes_the_same_function(family, gather):
    """And the routers are all that goes, so any ratio is out of reach and the method is called by itself."""
    model = build(family, num_local_experts=1, num_experts=1, num_experts_per_tok=1, norm_topk_prob=True)
    with pytest.raises(ValueError, match=r"which removes 0% of them; ratio=0\.2 is out of reach"):
        run(model, gather)
    job = Job(model, 0.0, [], [tiny_models.inputs(model)], progress=False)
    method = OneS(gather, steps=0)
    method.check(job)
    made, layers = method.compress(job)
    torch.testing.assert_close(tiny_models.logits(made), tiny_models.logits(model), rtol=0, atol=1e-5)
    assert all(layer.error < 1e-6 for layer in layers)


@mixtures
@every_gather
def test_a_mixture_of_equal_experts_becomes_the_same_function(family, gather):
    model = build(family, norm_topk_prob=True)
    for bank in expert_banks(model):
        with torch.no_grad():
            bank.gate_up.copy_(bank.gate_up[:1].clone().expand_as(bank.gate_up))
            bank.down.copy_(bank.down[:1].clone().expand_as(bank.down))
    options = {"expert_rank": 32} if gather == "svd" else {}
    result = run(model, gather, **options)
    same = torch.allclose(tiny_models.logits(result.model), tiny_models.logits(model), rtol=0, atol=1e-5)
    assert same == (gather != "sum")
    assert all((layer.error < 1e-6) == (gather != "sum") for layer in result.layers)


def test_gate_weights_that_do_not_sum_to_one_are_absorbed():
    """This Qwen3-MoE does not normalise them: with equal experts the block is their sum times one expert."""
    model = build("qwen3_moe")
    (bank, _) = expert_banks(model)
    used = route(model, [bank], [tiny_models.inputs(model, 6, 20)], progress=False)[bank.name]
    total = float(used.gate.sum())
    assert total < 0.99
    made = run(model, "mean").model.model.layers[0].mlp
    weights = used.gate / total
    expected = sum(float(u) * bank.down[e] for e, u in enumerate(weights)) * total
    torch.testing.assert_close(made.down_proj.weight, expected, rtol=0, atol=1e-6)
    gate = sum(float(u) * bank.expert(e).gate for e, u in enumerate(weights))
    torch.testing.assert_close(made.gate_proj.weight, gate, rtol=0, atol=1e-6)
    uniform = run(model, "mean", weighting="uniform").model.model.layers[0].mlp
    torch.testing.assert_close(uniform.down_proj.weight, total * bank.down.mean(0), rtol=0, atol=1e-6)


def test_alignment_gathers_permuted_copies_without_loss_and_only_then():
    lost = {}
    for align in (True, False):
        model = build("mixtral")
        make_permuted_copies(model)
        dense = tiny_models.logits(model)
        result = run(model, "mean", align=align)
        lost[align] = float((tiny_models.logits(result.model) - dense).abs().max() / dense.abs().max())
    assert lost[True] < 1e-6
    assert lost[False] > 0.01


@mixtures
@every_gather
def test_the_dense_model_is_smaller_and_plain_from_pretrained_gives_the_same_logits(family, gather, tmp_path):
    model = build(family, torch.float32)
    before = snapshot(model)
    result = run(model, gather, steps=2)
    made = result.model
    assert type(made).__name__ == TWINS[family]
    assert_unchanged(model, before)
    banks = expert_banks(model)
    gone = sum(3 * bank.expert_parameters for bank in banks) + sum(
        layer.mlp.gate.weight.numel() for layer in model.model.layers
    )
    assert result.parameters == (before_size := sum(p.numel() for p in model.parameters()), before_size - gone)
    assert result.ratio == pytest.approx(0.75)
    assert result.bytes[0] - result.bytes[1] == 4 * gone
    assert [layer.name for layer in result.layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    # Ordinary layers of the dense class: nothing is put together in the forward pass.
    assert {type(m) for layer in made.model.layers for m in layer.mlp.children()} == {
        torch.nn.Linear,
        type(model.model.layers[0].mlp.experts.act_fn),
    }
    save(model, tmp_path / "dense")
    save(made, tmp_path / "small")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("dense", "small")]
    assert sizes[0] - sizes[1] >= 4 * gone
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(again) is type(made)
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(made))


@mixtures
def test_distillation_brings_the_dense_model_nearer_to_the_mixture_and_is_repeatable(family):
    def distance(made: Any, model: Any) -> float:
        with torch.no_grad():
            z, target = (torch.log_softmax(tiny_models.logits(one), -1) for one in (made, model))
        return float((target.exp() * (target - z)).sum(-1).mean())

    models = [build(family, torch.float32) for _ in range(3)]
    data = [tiny_models.inputs(models[0])]
    made = [
        run(model, "mean", steps=steps, learning_rate=1e-2, task_weight=0.0, data=data).model
        for model, steps in zip(models, (0, 25, 25), strict=True)
    ]
    gathered, distilled = (distance(one, models[0]) for one in made[:2])
    assert distilled < 0.3 * gathered
    assert torch.equal(tiny_models.logits(made[1]), tiny_models.logits(made[2]))


def test_half_precision_comes_out_as_half_precision():
    model = build("mixtral", torch.bfloat16)
    result = run(model, "top", steps=1)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(tiny_models.logits(result.model)).all()


def test_what_cannot_be_done_is_refused_before_anything_changes():
    for options, message in (
        ({"gather": "best"}, "gather must be one of sum, mean, top, svd, not 'best'"),
        ({"weighting": "size"}, "weighting must be one of usage, uniform, not 'size'"),
        ({"expert_rank": 0}, "expert_rank must be at least 1 and goes with gather"),
        ({"expert_rank": 4, "gather": "mean"}, "not 4 for 'mean'"),
        ({"align": 1}, "align must be true or false, not 1"),
        ({"steps": -1}, "steps must be at least 0, not -1"),
        ({"learning_rate": 0.0}, "learning_rate must be a positive number, not 0.0"),
        ({"temperature": float("inf")}, "temperature must be a positive number, not inf"),
        ({"task_weight": 1.5}, r"task_weight must lie in \[0, 1\], not 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            OneS(**options)
    model = build("mixtral")
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"one of the 4 experts of model.layers.0.mlp.experts, which removes 75% of them; ratio=0\.9"
    ):
        run(model, ratio=0.9)
    llama = tiny_models.FAMILIES["llama"]()
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be turned into a dense model"):
        run(llama)
    assert_unchanged(model, before)
