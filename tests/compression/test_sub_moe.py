from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tiny_models
from eckart.compression import compress
from eckart.compression.sub_moe import merge
from eckart.models.experts import expert_banks, route
from eckart.models.geometry import geometry_of
from eckart.structures import EckartWarning
from mixtures import FAMILIES, batches, build, copied, make_permuted_copies

mixtures = pytest.mark.parametrize("family", FAMILIES)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(model: nn.Module, ratio: float, data: list[dict[str, torch.Tensor]], **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        return compress(model, "sub-moe", ratio=ratio, data=data, progress=False, **options)


def union(weights: torch.Tensor, frequency: torch.Tensor, rank: int | None = None) -> np.ndarray:
    """The paper's recipe as it stands: one SVD of the concatenation, the V_i averaged, multiplied out again."""
    u, s, vh = np.linalg.svd(np.concatenate(list(weights.numpy()), axis=1), full_matrices=False)
    v = vh.T.reshape(len(weights), weights.shape[2], -1)
    mean = np.einsum("c,cnr->nr", frequency.numpy(), v) / float(frequency.sum())
    u, s, mean = u[:, :rank], s[:rank], mean[:, :rank]
    assert np.allclose(u.T @ u, np.eye(u.shape[1]), atol=1e-12)
    return (u * s) @ mean.T


# ------------------------------------------------------------------------------------------------------- the merge


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 5, 8), (4, 6, 6), (2, 1, 7), (2, 7, 1)], ids=str)
def test_the_union_decomposition_is_the_weighted_average(shape):
    weights, frequency = normal(*shape), torch.rand(shape[0], generator=torch.Generator().manual_seed(1)).double()
    average = sum(float(f) * w for f, w in zip(frequency, weights, strict=True)) / float(frequency.sum())
    np.testing.assert_allclose(union(weights, frequency), average, atol=1e-12)
    np.testing.assert_allclose(merge(weights, frequency), average, atol=1e-14)


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.999])
def test_a_cut_basis_is_the_papers_truncation(energy):
    weights, frequency = normal(3, 8, 5), torch.tensor([0.5, 0.2, 0.1]).double()
    s = np.linalg.svd(np.concatenate(list(weights.numpy()), axis=1), compute_uv=False)
    rank = int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), energy)) + 1
    merged = merge(weights, frequency, energy)
    np.testing.assert_allclose(merged, union(weights, frequency, rank), atol=1e-12)
    assert np.linalg.matrix_rank(merged.numpy()) == min(rank, 5)


@pytest.mark.parametrize("energy", [1.0, 0.4])
def test_one_expert_is_left_alone_whatever_the_energy_and_copies_stay_what_they_are(energy):
    weight = normal(1, 6, 9)
    assert torch.equal(merge(weight, torch.tensor([0.3]), energy), weight[0])
    copies = weight.repeat(3, 1, 1)
    np.testing.assert_allclose(merge(copies, torch.tensor([0.3, 0.1, 0.9])), weight[0], atol=1e-14)


# ---------------------------------------------------------------------------------------------------- whole models


@mixtures
def test_each_stored_expert_is_the_average_of_its_cluster_by_frequency_and_the_router_is_untouched(family):
    model = build(family)
    given, before = batches(model), copied(model)
    routers = [layer.mlp.gate.weight.detach().clone() for layer in model.model.layers]
    used = route(model, expert_banks(model), given, progress=False)
    result = run(model, 0.5, given)
    for bank, experts, layer in zip(expert_banks(model), before, result.layers, strict=True):
        labels = geometry_of(bank.module).experts
        assert len(labels) == 4
        assert set(labels) == set(range(bank.count))
        frequency = used[bank.name].frequency.clamp(min=1 / used[bank.name].tokens)
        lost = 0.0
        for stored in range(bank.count):
            members = [index for index, label in enumerate(labels) if label == stored]
            for place, found in enumerate(bank.expert(stored)):
                weights = torch.stack([experts[index][place] for index in members])
                np.testing.assert_allclose(found.detach(), union(weights, frequency[members]), atol=1e-12)
                lost += float((weights - found.detach()).square().sum())
        whole = sum(float(w.square().sum()) for expert in experts for w in expert)
        assert layer.error == pytest.approx((lost / whole) ** 0.5)
        assert (layer.name, layer.form) == (bank.name, "experts")
        assert layer.parameters == bank.count * bank.expert_parameters
    assert sum(bank.count for bank in expert_banks(model)) == 4
    for layer, router in zip(model.model.layers, routers, strict=True):
        assert torch.equal(layer.mlp.gate.weight, router)
    assert result.ratio == pytest.approx(0.5)


def test_a_cut_basis_is_the_papers_truncation_in_a_whole_model_too():
    model = build("mixtral")
    before, given = copied(model), batches(model)
    used = route(model, expert_banks(model), given, progress=False)
    run(model, 0.5, given, basis_energy=0.6, window=1)
    for bank, experts in zip(expert_banks(model), before, strict=True):
        labels = torch.tensor(geometry_of(bank.module).experts)
        stored = int(torch.bincount(labels).argmax())
        members = (labels == stored).nonzero()[:, 0].tolist()
        assert len(members) > 1
        weights = torch.stack([experts[index].down for index in members])
        s = np.linalg.svd(np.concatenate(list(weights.numpy()), axis=1), compute_uv=False)
        rank = int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), 0.6)) + 1
        expected = union(weights, used[bank.name].frequency[members], rank)
        np.testing.assert_allclose(bank.down[stored].detach(), expected, atol=1e-12)


@mixtures
def test_the_block_adds_up_the_gate_weights_of_merged_experts(family):
    model = build(family)
    given = batches(model)
    run(model, 0.5, given)
    block = model.model.layers[0].mlp
    x = normal(1, 9, 32)
    _, weights, chosen = block.gate(x[0])
    (bank, _) = expert_banks(model)
    stored = torch.tensor(geometry_of(bank.module).experts)[chosen]
    expected = torch.zeros(9, 32).double()
    for expert in range(bank.count):
        gate = (weights.double() * (stored == expert)).sum(1, keepdim=True)
        expected += gate * bank.run(expert, x[0])
    torch.testing.assert_close(block(x)[0], expected, rtol=0, atol=1e-12)


@mixtures
def test_duplicated_experts_are_found_and_merging_them_changes_nothing(family):
    """Eight experts, of which only four differ: half of them can go without any change of the logits."""
    model = build(family, num_experts=8, num_local_experts=8)
    pairs = torch.tensor([0, 1, 2, 3, 3, 0, 2, 1])
    for bank in expert_banks(model):
        with torch.no_grad():
            bank.gate_up.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
            bank.down.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
            bank.gate_up.copy_(bank.gate_up[pairs].clone())
            bank.down.copy_(bank.down[pairs].clone())
    dense = tiny_models.logits(model)
    result = run(model, 0.5, batches(model))
    for bank in expert_banks(model):
        assert torch.equal(torch.tensor(geometry_of(bank.module).experts), pairs)
    torch.testing.assert_close(tiny_models.logits(model), dense, rtol=0, atol=1e-10)
    assert all(layer.error < 1e-12 for layer in result.layers)


def test_copies_with_noise_are_found_too_and_a_window_shares_its_experts():
    """One layer holds near copies, the other four different experts: together they may keep five."""
    model = build("mixtral")
    near, far = expert_banks(model)
    with torch.no_grad():
        for weight in (near.gate_up, near.down):
            weight.copy_(weight[:1] + 1e-3 * torch.randn_like(weight))
    shared = run(model, 3 / 8, batches(model))
    assert [bank.count for bank in expert_banks(model)] == [1, 4]
    assert [layer.form for layer in shared.layers] == ["experts", "dense"]
    assert shared.layers[0].error < 0.01
    assert geometry_of(far.module) is None


def test_windows_of_one_layer_keep_the_same_number_in_each():
    model = build("mixtral")
    run(model, 0.5, batches(model), window=1)
    assert [bank.count for bank in expert_banks(model)] == [2, 2]


def test_alignment_merges_permuted_copies_without_loss_and_only_then():
    lost = {}
    for align in (True, False):
        model = build("qwen3_moe")
        make_permuted_copies(model)
        dense = tiny_models.logits(model)
        run(model, 0.75, batches(model), align=align)
        lost[align] = float((tiny_models.logits(model) - dense).abs().max() / dense.abs().max())
    assert lost[True] < 1e-12
    assert lost[False] > 0.01


def test_output_clusters_and_frequencies_beat_random_clusters():
    """Eight experts in four families of similar ones: the paper's comparison at 8 -> 4, on logits."""
    errors: dict[str, float] = {}
    for kind in ("outputs", "random"):
        model = build("mixtral", num_local_experts=8)
        generator = torch.Generator().manual_seed(5)
        for bank in expert_banks(model):
            with torch.no_grad():
                for weight in (bank.gate_up, bank.down):
                    weight.normal_(std=0.3, generator=generator)
                    weight[4:] = weight[:4] + 0.05 * torch.randn(weight[4:].shape, generator=generator)
        dense, given = tiny_models.logits(model), batches(model)
        if kind == "random":
            for bank in expert_banks(model):
                order = [0, 1, 2, 3, 5, 6, 7, 4]  # merging i with i + 4 now merges strangers
                with torch.no_grad():
                    mixed = [
                        merge(w[[i, order[i + 4]]], torch.ones(2)) for w in (bank.gate_up, bank.down) for i in range(4)
                    ]
                    for place, weight in enumerate((bank.gate_up, bank.down)):
                        for i in range(4):
                            weight[i] = weight[order[i + 4]] = mixed[4 * place + i]
        else:
            run(model, 0.5, given)
        errors[kind] = float((tiny_models.logits(model) - dense).norm() / dense.norm())
    assert errors["outputs"] < 0.3 * errors["random"]
