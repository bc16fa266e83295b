"""Choosing a method: every candidate is tried on a copy, the best on held-out text comes first."""

from __future__ import annotations

import json

import pytest
import torch

import tiny_models
from eckart.compression import compress
from eckart.compression.auto import CANDIDATES, choose
from eckart.models import perplexity


@pytest.fixture
def data() -> list[torch.Tensor]:
    return [torch.randint(1, 60, (8, 16), generator=torch.Generator().manual_seed(0))]


def test_the_order_is_that_of_the_perplexities_measured_by_hand(data):
    tried = [("svd", "uniform"), ("svd-llm", "uniform"), ("svd-llm", "threshold")]
    choice = choose(tiny_models.FAMILIES["llama"](), data, ratio=0.4, candidates=tried, progress=False)
    calibrated, judged = [{"input_ids": data[0][:6]}], [{"input_ids": data[0][6:]}]
    expected = {}
    for method, allocation in tried:
        model = tiny_models.FAMILIES["llama"]()
        compress(model, method, ratio=0.4, allocation=allocation, data=calibrated, progress=False)
        expected[method, allocation] = perplexity(model, judged, progress=False).perplexity
    found = {(trial.method, trial.allocation): trial.perplexity for trial in choice.trials}
    assert found == pytest.approx(expected, rel=1e-4)
    assert [trial.perplexity for trial in choice.trials] == sorted(found.values())
    assert choice.best.perplexity == min(found.values())
    dense = perplexity(tiny_models.FAMILIES["llama"](), judged, progress=False).perplexity
    assert choice.dense == pytest.approx(dense)


def test_the_model_is_as_it_was(data):
    model = tiny_models.FAMILIES["llama"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    choose(model, data, ratio=0.3, progress=False)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_all_candidates_can_be_used_on_a_llama(data):
    choice = choose(tiny_models.FAMILIES["llama"](), data, ratio=0.3, progress=False)
    assert {(trial.method, trial.allocation) for trial in choice.trials} == set(CANDIDATES)
    assert not any(trial.reason for trial in choice.trials)
    assert all(trial.ratio >= 0.3 for trial in choice.trials)


def test_what_cannot_be_tried_is_last_with_the_reason(data):
    """Phi-3's fused projections are no parts that MoDeGPT could narrow."""
    tried = [("modegpt", "uniform"), ("svd", "uniform")]
    choice = choose(tiny_models.FAMILIES["phi3"](), data, ratio=0.3, candidates=tried, progress=False)
    assert [trial.method for trial in choice.trials] == ["svd", "modegpt"]
    assert "finds no attention" in choice.trials[1].reason
    assert json.loads(json.dumps(choice.to_dict(), allow_nan=False))["trials"][1]["perplexity"] is None


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("bert", {}, "only causal language models"),
        ("llama", {"sequences": 1}, "two sequences or more"),
        ("llama", {"candidates": []}, "there are none"),
        ("phi3", {"candidates": [("modegpt", "uniform")]}, "none of the candidates can compress this model: modegpt"),
    ],
)
def test_bad_input(data, family, arguments, message):
    with pytest.raises(ValueError, match=message):
        choose(tiny_models.FAMILIES[family](), data, **({"ratio": 0.3, "progress": False} | arguments))
