"""Attention is watched as it is, and nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny_models
from eckart.models.attention_states import watching_attention


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [name for name in tiny_models.FAMILIES if name != "gemma2"])
def test_the_model_computes_the_same_while_watched(family, implementation):
    model = tiny_models.FAMILIES[family]()
    model.set_attn_implementation(implementation)
    expected = tiny_models.logits(model)
    calls = []
    with watching_attention(model, calls.append):
        assert torch.equal(tiny_models.logits(model), expected)
    assert len(calls) >= tiny_models.LAYERS
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping
    tiny_models.logits(model)
    assert len(calls) <= 3 * tiny_models.LAYERS


@torch.no_grad()
def test_what_is_seen_makes_what_attention_gives():
    """The definition, with the soft cap of gemma2 left out by its size."""
    for family in ("llama", "bert"):
        model = tiny_models.FAMILIES[family]()
        model.set_attn_implementation("eager")
        calls = []
        with watching_attention(model, calls.append):
            tiny_models.logits(model)
        for call in calls:
            share = call.query.shape[1] // call.key.shape[1]
            key, value = (part.repeat_interleave(share, dim=1) for part in (call.key, call.value))
            scores = call.scaling * call.query @ key.mT
            if call.causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            torch.testing.assert_close((scores.softmax(-1) @ value).transpose(1, 2), call.output)


def test_watchers_side_by_side_see_their_own_model_only():
    one, other = tiny_models.FAMILIES["llama"](), tiny_models.FAMILIES["qwen3"]()
    first, second = [], []
    before = dict(AttentionInterface())
    outer = watching_attention(one, first.append)
    outer.__enter__()
    with watching_attention(other, second.append):
        outer.__exit__(None, None, None)  # not in the order of entering
        tiny_models.logits(one)
        tiny_models.logits(other)
    assert (len(first), len(second)) == (0, 2)
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping
    assert dict(AttentionInterface()) == before


def test_all_is_put_back_after_an_error():
    model = tiny_models.FAMILIES["llama"]()

    def fail(call):
        raise RuntimeError("seen")

    with pytest.raises(RuntimeError, match="seen"), watching_attention(model, fail):
        tiny_models.logits(model)
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping
