"""Shares found by trying: what is tried, that the best is kept, and that the model stays as it was."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import tiny_models
from eckart.compression import compress
from eckart.models import calibrate, perplexity
from eckart.structures import EckartWarning
from model_state import assert_unchanged, snapshot

RATIO = 0.4


@pytest.fixture(scope="module")
def trained():
    """A tiny Llama that has learnt to count in threes, so that layers differ in what they are worth."""
    model = tiny_models.FAMILIES["llama"]()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        ids = counting(8, step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def counting(sequences: int, seed: int) -> torch.Tensor:
    starts = torch.randint(60, (sequences, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + 3 * torch.arange(12)) % 60 + 1


@pytest.fixture(scope="module")
def data() -> list[torch.Tensor]:
    return [counting(8, 1000)]


def quiet(model, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        return compress(model, *args, **({"ratio": RATIO, "allocation": "search", "progress": False} | options))


def losses_by_hand(model, method: str, data: list[torch.Tensor], allocations: list[str]) -> dict[str, float]:
    """Held-out loss of each way to share: calibrated on six of eight sequences, judged by two."""
    found = {}
    for allocation in allocations:
        made = copy.deepcopy(model)
        quiet(made, method, data=[data[0][:6]], allocation=allocation)
        found[allocation] = perplexity(made, [data[0][6:]], progress=False).loss
    return found


@pytest.mark.parametrize("method", ["svd", "svd-llm", "pifa", "fwsvd", "afm-ctr"])
def test_the_starts_are_the_named_policies_and_the_found_shares_are_no_worse(trained, data, method):
    result = quiet(copy.deepcopy(trained), method, data=data, evaluations=5)
    search = result.settings["search"]
    by_hand = losses_by_hand(trained, method, data, ["uniform", "threshold", "block-influence"])
    assert search["trials"] == 5
    # Statistics of single sequences are sums in another order.
    assert search["uniform"] == pytest.approx(by_hand["uniform"], rel=1e-4)
    if method == "afm-ctr":  # its biases leave no room for the smallest shares: what stays dense then must not win
        assert search["found"] <= by_hand["uniform"] * (1 + 1e-4)
    else:
        assert search["found"] <= min(by_hand.values()) * (1 + 1e-4)
    assert search["dense"] == pytest.approx(perplexity(trained, [data[0][6:]], progress=False).loss, rel=1e-6)
    assert result.ratio >= RATIO


def test_more_trials_never_find_a_larger_loss_and_moves_find_a_smaller_one(trained, data):
    found = [
        quiet(copy.deepcopy(trained), "svd", data=data, evaluations=count).settings["search"]["found"]
        for count in (1, 3, 16)
    ]
    assert found == sorted(found, reverse=True)
    assert found[2] < found[1] < found[0]


def test_the_same_request_gives_the_same_weights(trained, data):
    made = [copy.deepcopy(trained) for _ in range(2)]
    state = torch.random.get_rng_state()
    for model in made:
        quiet(model, "svd-llm", data=data, evaluations=6)
    assert torch.equal(torch.random.get_rng_state(), state)
    for (name, one), (_, other) in zip(made[0].state_dict().items(), made[1].state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_statistics_that_are_given_are_used_for_every_trial(trained, data):
    """The trials then know the text that they are judged by, as the caller wished."""
    statistics = calibrate(trained, data, ["gram"], progress=False)
    given = quiet(copy.deepcopy(trained), "svd-llm", data=data, statistics=statistics, evaluations=1)
    made = copy.deepcopy(trained)
    quiet(made, "svd-llm", statistics=statistics, allocation="uniform")
    expected = perplexity(made, [data[0][6:]], progress=False).loss
    assert given.settings["search"]["uniform"] == pytest.approx(expected, rel=1e-6)


def test_a_size_in_bytes_is_met(trained, data):
    model = copy.deepcopy(trained)
    before = sum(p.nbytes for p in model.parameters())
    result = quiet(model, "svd", data=data, ratio=None, bytes=0.8 * before, evaluations=5)
    assert result.bytes[1] <= 0.8 * before


def test_a_rank_is_not_shared_so_nothing_is_tried(trained):
    result = quiet(copy.deepcopy(trained), "svd", ratio=None, rank=6)
    assert "search" not in result.settings
    assert {layer.rank for layer in result.layers} == {6}


@pytest.mark.parametrize(
    ("family", "method", "options", "message"),
    [
        ("bert", "svd", {}, "judges by held-out loss, which only causal language models have; choose another"),
        ("llama", "svd", {"data": [torch.arange(12)]}, "needs two sequences or more: to calibrate on, and to judge by"),
        ("llama", "svd", {"data": None}, "svd needs calibration data: give data=batches, or tokenizer="),
        ("llama", "svd", {"ratio": 0.999}, "use a ratio of at most"),
        ("llama", "svd", {"evaluations": 0}, "evaluations must be at least 1, not 0"),
        ("llama", "modegpt", {}, "modegpt shares a budget over blocks: allocation must be uniform or block-influence"),
        ("llama", "loraprune", {}, "loraprune shares its budget itself; leave out allocation"),
    ],
)
def test_what_it_cannot_do_is_refused_and_the_model_is_as_it_was(data, family, method, options, message):
    model = tiny_models.FAMILIES[family]()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as caught:
        quiet(model, method, **({"data": data} | options))
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)
