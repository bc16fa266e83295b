from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import tiny_models
from eckart.models import blocks
from eckart.models.influence import block_influence


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_it_is_one_minus_the_mean_cosine_of_hidden_states(side):
    """By the hidden states that transformers returns; the last one it returns is normed, so all blocks but the last."""
    model = tiny_models.FAMILIES["llama"]().double()
    ids = tiny_models.inputs(model, 3, 7)["input_ids"]
    mask = torch.ones_like(ids)
    if side != "none":
        mask[0, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    seen = []
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        states = [*model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[:-1], seen[0]]
    rows = [state[mask.bool()].numpy() for state in states]
    expected = [
        1 - np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
        for a, b in itertools.pairwise(rows)
    ]
    batches = [{"input_ids": ids[:1], "attention_mask": mask[:1]}, {"input_ids": ids[1:], "attention_mask": mask[1:]}]
    found = block_influence(model, blocks(model), batches, progress=False)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert found.dtype == torch.float64


def test_a_block_that_adds_nothing_has_none():
    model = tiny_models.FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    found = block_influence(model, blocks(model), [tiny_models.inputs(model)], progress=False)
    assert found[0] > 0.01
    assert abs(float(found[1])) < 1e-12


def test_no_token_is_refused():
    model = tiny_models.FAMILIES["llama"]()
    with pytest.raises(ValueError, match=r"no calibration token reaches model\.layers\.0; give other data"):
        block_influence(model, blocks(model), [], progress=False)


def test_the_model_is_as_it_was():
    model = tiny_models.FAMILIES["llama"]().train()
    block_influence(model, blocks(model), [tiny_models.inputs(model)], progress=False)
    assert all(module.training for module in model.modules())
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in model.modules())
