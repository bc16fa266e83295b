from __future__ import annotations

import warnings
from typing import get_args

import numpy as np
import pytest
import torch

import tiny_models
from eckart.compression import compress
from eckart.compression.policies import Policy, attention_shares, block_shares, is_spectral, known, shares_of
from eckart.models import blocks, linears
from eckart.models.influence import block_influence
from eckart.structures import EckartWarning


def test_names():
    assert known() == get_args(Policy)
    assert [name for name in known() if not is_spectral(name)] == ["block-influence", "lorap", "search"]


# ------------------------------------------------------------------------------------------------------------ blocks


def test_shares_are_a_softmax():
    influence = torch.tensor([0.3, 0.1, 0.25, 0.4])
    weights = np.exp(-influence.double().numpy() / 0.1)
    np.testing.assert_allclose(block_shares(influence, 0.2), 4 * 0.2 * weights / weights.sum(), rtol=1e-12)


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.7, 0.8, 0.95])
@pytest.mark.parametrize("temperature", [1e-4, 0.05, 0.1, 10])
def test_the_mean_is_the_ratio_and_nothing_exceeds_the_most(ratio, temperature):
    """At the smallest temperature all weights but one are zero in float64."""
    influence = torch.rand(12, generator=torch.Generator().manual_seed(0))
    removed = block_shares(influence, ratio, temperature=temperature)
    assert float(removed.mean()) == pytest.approx(ratio, rel=1e-12)
    assert float(removed.max()) <= max(0.8, ratio) + 1e-12
    assert float(removed.min()) >= 0
    order = influence.argsort()
    assert bool((removed[order].diff() <= 1e-12).all()), "who changes more loses less"


def test_what_is_cut_off_goes_to_the_others_in_proportion():
    influence = torch.tensor([0.0, 0.3, 0.4, 0.5])
    removed, weights = block_shares(influence, 0.4, most=0.9), torch.softmax(-influence.double() / 0.1, 0)
    assert float(removed[0]) == 0.9
    torch.testing.assert_close(removed[1:] / removed[1:].sum(), weights[1:] / weights[1:].sum())


# --------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.4, 0.6, 0.9])
@pytest.mark.parametrize("narrow", [1, 4])
def test_the_budget_of_an_attention_is_spent(ratio, narrow):
    h = 64
    shapes = {"q": (h, h), "k": (h // narrow, h), "v": (h // narrow, h), "o": (h, h)}
    removed = attention_shares(shapes, ["v", "o"], ratio)
    sizes = {name: m * n for name, (m, n) in shapes.items()}
    total = sum(sizes.values())
    assert sum(removed[n] * sizes[n] for n in sizes) == pytest.approx(ratio * total)
    assert removed["v"] == removed["o"] <= removed["q"] == removed["k"]
    if removed["v"] > 0:
        assert 1 - removed["v"] == pytest.approx(3 * (1 - removed["q"]))


def test_the_paper_in_numbers():
    """rho = 0.8, square: k_min = 0.3 h for q and k in plain form, v and o untouched; rho = 0.4: 2 k_att / (1 + a)."""
    shapes = dict.fromkeys("qkvo", (100, 100))
    removed = attention_shares(shapes, ["v", "o"], 0.2)
    assert removed["v"] == removed["o"] == 0
    assert (1 - removed["q"]) * 100 / 2 == pytest.approx(30)
    removed = attention_shares(shapes, ["v", "o"], 0.6)
    k_att = 0.4 * 100 / 2
    assert (1 - removed["q"]) * 100 / 2 == pytest.approx(2 * k_att / 4)
    assert (1 - removed["v"]) * 100 / 2 == pytest.approx(2 * 3 * k_att / 4)


# -------------------------------------------------------------------------------------------------- selected linears


@pytest.mark.parametrize("policy", ["block-influence", "lorap"])
@pytest.mark.parametrize("where", [None, ["*.0.*", "*.1.mlp.up_proj"], "*.self_attn.*"])
def test_all_selected_numbers_together_meet_the_ratio(policy, where):
    model = tiny_models.FAMILIES["llama"]()
    members, found = linears(model, where).linears, blocks(model)
    roles = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
    removed = shares_of(
        policy, members, found, 0.3, influence=torch.tensor([0.3, 0.35]),
        roles={r.name: roles[r.name.rpartition(".")[2]] for r in members if r.name.rpartition(".")[2] in roles},
    )  # fmt: skip
    sizes = {ref.name: ref.in_features * ref.out_features for ref in members}
    assert removed.keys() == sizes.keys()
    assert sum(removed[n] * sizes[n] for n in sizes) == pytest.approx(0.3 * sum(sizes.values()))


def test_any_method_of_single_weights_can_be_shared_by_influence():
    model = tiny_models.FAMILIES["llama"]()
    batch = tiny_models.inputs(model, 4, 20)
    influence = block_influence(model, blocks(model), [batch], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        result = compress(model, "svd", ratio=0.4, allocation="block-influence", data=[batch], progress=False)
    assert 0.4 <= result.ratio < 0.46
    kept = torch.zeros(2, dtype=torch.float64)
    for layer in result.layers:
        kept[int(layer.name.split(".")[2])] += layer.parameters
    assert int(kept.argmax()) == int(influence.argmax())


def test_lorap_shares_rank_for_any_method_of_single_weights():
    model = tiny_models.FAMILIES["llama"]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        result = compress(model, "svd", ratio=0.3, allocation="lorap", form="plain", progress=False)
    ranks = {layer.name.rpartition(".")[2]: layer.rank for layer in result.layers if ".0." in layer.name}
    assert ranks["q_proj"] < ranks["o_proj"]
    assert ranks["k_proj"] < ranks["v_proj"]
    assert result.ratio >= 0.3
