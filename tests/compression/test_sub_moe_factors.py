"""Sub-MoE with experts as factors: against SVDs of stacked matrices in float64, and what such a model promises."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import tiny_models
from eckart.compression import compress, recover
from eckart.compression.expert_factors import shared_left, shared_rank, shared_right
from eckart.compression.sub_moe import SubMoE
from eckart.models import export_dense, save
from eckart.models.experts import expert_banks, route
from eckart.models.geometry import geometry_of
from eckart.structures import EckartWarning
from eckart.structures.factored_experts import FactoredExperts
from mixtures import FAMILIES, batches, build, copied, make_permuted_copies
from model_state import assert_unchanged, snapshot

mixtures = pytest.mark.parametrize("family", FAMILIES)
NAME = "model.layers.0.mlp.experts"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grams(count: int, width: int) -> torch.Tensor:
    """Of different inputs for each expert."""
    x = (
        normal(count, 3 * width, width, seed=5)
        * 0.8 ** torch.arange(width)
        * torch.linspace(1, 3, count)[:, None, None]
    )
    return x.mT @ x


def run(model: nn.Module, ratio: float, data: list[dict[str, torch.Tensor]], **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        return compress(model, "sub-moe", ratio=ratio, data=data, progress=False, **options)


# -------------------------------------------------------------------------------------------------- the mathematics


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 5, 8), (1, 6, 6), (4, 3, 7)], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_shared_output_basis_is_that_of_the_whitened_stack_and_the_best_for_all_experts_together(shape, rank):
    weights, seen = normal(*shape), grams(shape[0], shape[2])
    basis, own = shared_left(weights, seen, rank)
    stack = np.concatenate([w.numpy() @ np.linalg.cholesky(g.numpy()) for w, g in zip(weights, seen, strict=True)], 1)
    u, s, _ = np.linalg.svd(stack, full_matrices=False)
    np.testing.assert_allclose(basis @ basis.T, u[:, :rank] @ u[:, :rank].T, atol=1e-7)
    lost = weights - basis @ own
    squared = sum(float((e @ g @ e.T).trace()) for e, g in zip(lost, seen, strict=True))
    assert squared == pytest.approx(float((s[rank:] ** 2).sum()), rel=1e-8)
    # And with this basis no other coefficients do better: the gradient with respect to each V_i is zero.
    for e, g in zip(lost, seen, strict=True):
        assert float((basis.T @ e @ g).abs().max()) < 1e-9 * float(g.abs().max())


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 5, 8), (1, 6, 6), (4, 3, 7)], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_shared_input_basis_is_the_best_under_the_sum_of_what_the_experts_see(shape, rank):
    weights, seen = normal(*shape), grams(shape[0], shape[2])
    shared, own = shared_right(weights, seen, rank)
    s = np.linalg.svd(np.concatenate(list(weights.numpy())) @ np.linalg.cholesky(seen.sum(0).numpy()), compute_uv=False)
    lost = (weights - own @ shared).flatten(0, 1)
    assert float((lost @ seen.sum(0) @ lost.T).trace()) == pytest.approx(float((s[rank:] ** 2).sum()), rel=1e-8)


def test_low_rank_experts_are_the_papers_recipe_with_its_inverses():
    """Step 9 as it stands: whiten each member, one SVD, V' carried back by S_i^-1 and averaged, two matrices kept."""
    model = build("mixtral")
    before, given = copied(model), batches(model)
    seen, used = independent_grams(model, given, tokens=4096)
    run(model, 0.6, given, experts="low-rank", intra=0.2, window=1)
    bank = model.model.layers[0].mlp.experts
    assert bank.count == 2
    labels = torch.tensor(geometry_of(bank).experts)
    for place in range(2):
        members = (labels == place).nonzero()[:, 0].tolist()
        f = used[members].numpy()
        for part, index in (("gate", 0), ("down", 2)):
            ws = [before[0][m][index].numpy() for m in members]
            roots = [np.linalg.cholesky(seen[m][0 if part == "gate" else 1]) for m in members]
            rank = getattr(bank.groups[place], part).rank
            u, s, vh = np.linalg.svd(np.concatenate([w @ r for w, r in zip(ws, roots, strict=True)], 1))
            parts = vh[: len(s)].T.reshape(len(members), ws[0].shape[1], -1)
            v = sum(fi * np.linalg.inv(r).T @ p for fi, r, p in zip(f, roots, parts, strict=True)) / f.sum()
            wanted = (u[:, :rank] * s[:rank]) @ v[:, :rank].T
            found = getattr(bank.groups[place], part).dense()[0].detach()
            np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_rank_is_the_largest_that_fits(side):
    for count in (1, 3, 8):
        for m, n in ((48, 32), (32, 48), (5, 64)):
            for keep in (0.05, 0.3, 0.5, 0.9):
                rank = shared_rank(count, (m, n), side, keep)
                each, own = (m, n) if side == "left" else (n, m)
                numbers = [r * (each + count * own) for r in (rank, rank + 1)]
                assert numbers[0] <= keep * count * m * n < numbers[1]
                assert rank <= min((m, count * n) if side == "left" else (count * m, n))


# ---------------------------------------------------------------------------------------------------- whole models


@torch.no_grad()
def independent_grams(
    model: Any, given: list[dict[str, torch.Tensor]], tokens: int
) -> tuple[list[list[np.ndarray]], torch.Tensor]:
    """[expert][inputs, hidden] of the first layer from what its bank is called with, and how often each is used."""
    calls: list[Any] = []
    layer = model.model.layers[0].mlp.experts
    handle = layer.register_forward_pre_hook(lambda _, args: calls.append(args))
    for batch in given:
        model(**batch)
    handle.remove()
    x, chosen = torch.cat([c[0] for c in calls]).double(), torch.cat([c[1] for c in calls])
    found, used = [], []
    for index, (gate, up, _) in enumerate(copied(model)[0]):
        hidden = nn.functional.silu(x @ gate.double().T) * (x @ up.double().T)
        weight = (chosen == index).any(1).double()
        used.append(float(weight.mean()))
        weight = weight + 1 / tokens
        found.append([(rows.T @ (weight[:, None] * rows)).numpy() for rows in (x, hidden)])
    return found, torch.tensor(used).double()


@mixtures
@pytest.mark.parametrize("basis", ["output", "stream"])
def test_each_expert_of_a_group_is_the_best_with_the_shared_factor(family, basis):
    model = build(family)
    before, given = copied(model)[0], batches(model)
    seen, _ = independent_grams(model, given, tokens=4096)
    result = run(model, 0.4, given, experts="shared", group=2, basis=basis)
    bank = model.model.layers[0].mlp.experts
    assert isinstance(bank, FactoredExperts)
    assert sorted(m for group in bank.layout for m in group.members) == [0, 1, 2, 3]
    assert geometry_of(bank) is None
    lost = 0.0
    for group, factors in zip(bank.layout, bank.groups, strict=True):
        for index, part in enumerate(("gate", "up", "down")):
            factor, place = getattr(factors, part), 0 if part != "down" else 1
            ws = np.stack([before[m][index].numpy() for m in group.members])
            gs = np.stack([seen[m][place] for m in group.members])
            count, m, n = ws.shape
            assert factor.rank == shared_rank(count, (m, n), factor.side, 0.6)
            if basis == "output" or part == "down":
                stack = np.concatenate([w @ np.linalg.cholesky(g) for w, g in zip(ws, gs, strict=True)], 1)
                u = np.linalg.svd(stack, full_matrices=False)[0][:, : factor.rank]
                wanted = u @ (u.T @ ws)
            else:
                u = np.linalg.svd(np.concatenate(ws) @ np.linalg.cholesky(gs.sum(0)), full_matrices=False)[0]
                u = u[:, : factor.rank]
                wanted = (u @ (u.T @ np.concatenate(ws))).reshape(ws.shape)
            np.testing.assert_allclose(factor.dense().detach(), wanted, atol=1e-6)
            lost += float(((ws - wanted) ** 2).sum())
    whole = sum(float(w.square().sum()) for expert in before for w in expert)
    assert result.layers[0].error == pytest.approx((lost / whole) ** 0.5, rel=1e-6)


@mixtures
@pytest.mark.parametrize(
    "options",
    [
        {"experts": "low-rank", "intra": 0.3},
        {"experts": "low-rank", "intra": 0.5},
        {"experts": "shared"},
        {"experts": "shared", "group": 1, "basis": "stream"},
    ],
    ids=str,
)
def test_bytes_fall_and_plain_from_pretrained_gives_the_same_logits(family, options, tmp_path):
    save(build(family, torch.float32), tmp_path / "source")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.bfloat16)
    size = sum(p.nbytes for p in model.parameters())
    experts = sum(bank.shape[0] * bank.shape[1] for bank in expert_banks(model))
    save(model, tmp_path / "dense")
    result = run(model, 0.5, batches(model), **options)
    stored = [module for module in model.modules() if isinstance(module, FactoredExperts)]
    assert len(stored) == 2
    removed = experts - sum(bank.num_parameters() for bank in stored)
    assert removed >= 0.5 * experts
    assert result.parameters[0] - result.parameters[1] == removed
    assert size - sum(p.nbytes for p in model.parameters()) == 2 * removed
    save(model, tmp_path / "small")
    on_disk = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("dense", "small")]
    assert on_disk[0] - on_disk[1] >= 2 * removed - 4096  # the names of more tensors
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))
    assert again.config.quantization_config.history[0]["options"]["experts"] == options["experts"]
    # The same once more, from the loaded model.
    save(again, tmp_path / "twice")
    twice = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "twice", dtype=torch.bfloat16)
    assert torch.equal(tiny_models.logits(twice), tiny_models.logits(model))


@mixtures
@pytest.mark.parametrize("basis", ["output", "stream"])
def test_the_answers_are_those_of_the_rebuilt_dense_bank(family, basis, tmp_path):
    model = build(family)
    run(model, 0.4, batches(model), experts="shared", group=2, basis=basis)
    wanted = tiny_models.logits(model)
    export_dense(model, tmp_path / "dense")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float64)
    assert not hasattr(exported.config, "quantization_config")
    assert len(expert_banks(exported)) == 2
    exported.set_experts_implementation("eager")
    torch.testing.assert_close(tiny_models.logits(exported), wanted, rtol=0, atol=1e-10)
    model.dequantize()
    assert [bank.count for bank in expert_banks(model)] == [4, 4]
    torch.testing.assert_close(tiny_models.logits(model), wanted, rtol=0, atol=1e-10)


def test_experts_that_share_a_basis_are_met_without_loss_where_factors_of_their_own_are_not():
    lost = {}
    for group in (1, 4):
        model = build("mixtral")
        with torch.no_grad():
            for bank in expert_banks(model):
                for weight in (bank.gate_up[:, : bank.width], bank.gate_up[:, bank.width :], bank.down):
                    basis = torch.linalg.qr(normal(weight.shape[1], 10, seed=weight.shape[2])).Q
                    weight.copy_(basis @ (basis.T @ weight))
        dense = tiny_models.logits(model)
        result = run(model, 0.6, batches(model), experts="shared", group=group)
        assert result.ratio >= 0.6
        lost[group] = float((tiny_models.logits(model) - dense).abs().max() / dense.abs().max())
    assert lost[4] < 1e-6
    assert lost[1] > 1e-3


def test_low_rank_experts_without_merging_leave_the_router_alone_and_merged_ones_answer_by_their_cluster():
    model = build("qwen3_moe")
    run(model, 0.3, batches(model), experts="low-rank", intra=0.3)
    banks = [module for module in model.modules() if isinstance(module, FactoredExperts)]
    assert [bank.count for bank in banks] == [4, 4]
    assert [geometry_of(bank) for bank in banks] == [None, None]
    model = build("qwen3_moe")
    run(model, 0.65, batches(model), experts="low-rank", intra=0.3)
    (block, bank) = (model.model.layers[0].mlp, model.model.layers[0].mlp.experts)
    stored = torch.tensor(geometry_of(bank).experts)
    x = normal(1, 9, 32)
    _, weights, chosen = block.gate(x[0])
    expected = torch.zeros(9, 32).double()
    for expert in range(bank.count):
        gate = (weights.double() * (stored[chosen] == expert)).sum(1, keepdim=True)
        expected += gate * bank.run(expert, x[0])
    torch.testing.assert_close(block(x)[0], expected, rtol=0, atol=1e-12)


def test_alignment_helps_a_shared_output_basis_and_one_on_the_stream_does_not_need_it():
    lost = {}
    for basis, align in (("output", False), ("output", True), ("stream", False), ("stream", True)):
        model = build("qwen3_moe")
        make_permuted_copies(model)
        result = run(model, 0.3, batches(model), experts="shared", basis=basis, align=align)
        lost[basis, align] = result.layers[0].error
    assert lost["output", True] < 0.8 * lost["output", False]
    assert lost["stream", True] == pytest.approx(lost["stream", False], rel=1e-6)


def test_padding_and_batching_do_not_change_the_result():
    plain = build("mixtral")
    (batch,) = batches(plain, 4, 9)
    filler = torch.full((4, 5), 7)
    padded = {
        "input_ids": torch.cat([filler, batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.zeros_like(filler), batch["attention_mask"]], 1),
    }
    run(plain, 0.4, [batch], experts="shared", group=2)
    for given in ([padded], [{key: value[i : i + 1] for key, value in batch.items()} for i in range(4)]):
        other = build("mixtral")
        run(other, 0.4, given, experts="shared", group=2)
        for one, two in zip(plain.model.layers, other.model.layers, strict=True):
            assert one.mlp.experts.layout == two.mlp.experts.layout
            for name, wanted in one.mlp.experts.dense().items():
                torch.testing.assert_close(two.mlp.experts.dense()[name], wanted, rtol=0, atol=1e-5)


def test_an_expert_without_tokens_is_factored_by_what_all_tokens_say():
    model = build("mixtral", num_local_experts=5)
    with torch.no_grad():
        # Whatever the sign of w x, two of the first four are ahead of the fifth.
        router = torch.tensor([[1.0], [-1.0], [0.5], [-0.5], [0.1]]) * torch.linspace(-1, 1, 32)
        model.model.layers[0].mlp.gate.weight.copy_(router)
    assert float(route(model, expert_banks(model), batches(model), progress=False)[NAME].frequency[4]) == 0
    with pytest.warns(EckartWarning, match=re.escape(f"{NAME}: no calibration token was sent to experts 4;")):
        compress(model, SubMoE(experts="shared", group=1), ratio=0.3, data=batches(model), progress=False)
    assert torch.isfinite(tiny_models.logits(model)).all()


def test_factored_experts_are_trained_in_recovery():
    model = build("mixtral", torch.float32)
    run(model, 0.5, batches(model), experts="shared")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        recover(model, batches(model), 3, progress=False)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert all(name in moved for name in before if ".groups." in name)


def test_what_cannot_be_done_is_refused_before_anything_changes():
    for options, message in (
        ({"experts": "thin"}, "experts must be one of merged, low-rank, shared, not 'thin'"),
        ({"basis": "input"}, "basis must be one of output, stream, not 'input'"),
        ({"group": 0}, "group must be at least 1, not 0"),
        ({"intra": 1.0}, r"intra must lie between 0 and 1 .* not 1.0"),
        ({"experts": "shared", "basis_energy": 0.5}, "basis_energy is for merged experts; shared ones are cut by"),
    ):
        with pytest.raises(ValueError, match=message):
            SubMoE(**options)
    model = build("mixtral")
    before = snapshot(model)
    for ratio, options, message in (
        (0.2, {"intra": 0.3}, "intra=0.3 alone removes more than ratio=0.2; lower intra, or raise ratio"),
        (0.9, {"intra": 0.5}, r"ratio=0.9 leaves 1 experts for the 2 layers .* largest ratio is about 0.88"),
        (0.99, {"experts": "shared"}, f"{NAME}: 1.0% of an expert's 48 x 32 matrices is less than one direction"),
    ):
        with pytest.raises(ValueError, match=message):
            run(model, ratio, batches(model), **{"experts": "low-rank", **options})
    assert_unchanged(model, before)
    run(model, 0.5, batches(model), experts="shared")
    with pytest.raises(ValueError, match="compressed by Eckart already"):
        run(model, 0.5, batches(model))
