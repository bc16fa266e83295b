"""Factors of the gradients equal what a backward pass into the weights gives, in every family, and leave no trace."""

from __future__ import annotations

import pytest
import torch

import tiny_models
from eckart.models import linears
from eckart.models.batches import single_examples
from eckart.models.gradient_factors import attention_parts, gradient_factors, in_float32, neighbours
from model_state import assert_unchanged, snapshot

ROLES = ["query", "key", "value", "output"]


def example(model, tokens=10):
    """One example with labels, as the model's kind takes it."""
    batch = tiny_models.inputs(model, batch=1, tokens=tokens)
    if "pixel_values" in batch:
        return {**{k: v.to(model.dtype) for k, v in batch.items()}, "labels": torch.tensor([1])}
    batch.pop("decoder_input_ids", None)
    labels = batch["input_ids"].clone()
    labels[:, :4] = -100
    return {**batch, "labels": labels}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_factors_equal_the_gradient_of_the_weights(family):
    model = tiny_models.FAMILIES[family]().double()
    model.config._experts_implementation = "eager"  # the fused kernel for experts has no float64
    batch = example(model)
    model(**batch).loss.backward()
    weights = {ref.name: ref.module.weight.grad.mT if ref.kind == "conv1d" else ref.module.weight.grad
               for ref in linears(model).linears}  # fmt: skip
    grads = {name: grad.clone() for name, grad in weights.items() if grad is not None}
    model.zero_grad(set_to_none=True)
    parts = attention_parts(model)
    with torch.no_grad():
        loss, factors = gradient_factors(model, parts, batch)
        assert loss == pytest.approx(float(model(**batch).loss), rel=1e-12)
    for part, (d, x) in zip(parts, factors, strict=True):
        exact = torch.cat([grads[part.name][start:stop] for start, stop in part.rows])
        assert exact.shape == (part.outputs, part.inputs)
        assert (d.mT @ x - exact).norm() <= 1e-12 * exact.norm()
        assert exact.norm() > 0


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_attention_has_its_four_parts(family):
    model = tiny_models.FAMILIES[family]()
    parts = attention_parts(model)
    attentions = 3 * tiny_models.LAYERS if family == "t5" else tiny_models.LAYERS
    assert [part.role for part in parts] == ROLES * attentions
    assert len({part.attention for part in parts}) == attentions
    assert len({(part.name, part.rows) for part in parts}) == len(parts)
    links = neighbours(parts)
    for i, (partner, following) in enumerate(links):
        assert links[partner][0] == i
        assert parts[partner].attention == parts[i].attention
        if following is not None:
            assert (parts[following].role, parts[following].attention[2]) == (parts[i].role, 1)
    assert sum(following is None for _, following in links) == 4 * attentions // tiny_models.LAYERS


def test_selection():
    model = tiny_models.FAMILIES["llama"]()
    parts = attention_parts(model, "*.0.self_attn.[qo]_proj")
    assert [part.role for part in parts] == ["query", "output"]
    assert neighbours(parts) == [(1, None), (0, None)]
    with pytest.raises(ValueError, match="no projection of an attention"):
        attention_parts(model, "*.down_proj")
    with pytest.raises(ValueError, match="nearest"):
        attention_parts(model, "*.q_prj")


def test_structures_in_place_of_weights():
    model = tiny_models.FAMILIES["llama"]().double()
    parts, batch = attention_parts(model), example(model)
    _, dense = gradient_factors(model, parts, batch)
    tiny_models.low_rank(model)  # of full rank: the same function
    _, factored = gradient_factors(model, attention_parts(model), batch)
    for (d1, x1), (d2, x2) in zip(dense, factored, strict=True):
        assert torch.allclose(d1.mT @ x1, d2.double().mT @ x2.double(), atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_stays_as_it_was(frozen):
    model = tiny_models.FAMILIES["gpt2"]().bfloat16().requires_grad_(not frozen)
    batch = example(model)
    model(**batch).loss.backward() if not frozen else None
    before, kept = snapshot(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    with in_float32(model):
        _, factors = gradient_factors(model, attention_parts(model), batch)
    assert all(d.dtype == x.dtype == torch.float32 for d, x in factors)
    assert_unchanged(model, before)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == kept
    with pytest.raises(RuntimeError, match="stop"), in_float32(model):
        raise RuntimeError("stop")
    assert_unchanged(model, before)


def test_what_has_no_loss_is_refused():
    model = tiny_models.FAMILIES["llama"]()
    before, parts, batch = snapshot(model), attention_parts(model), example(model)
    with pytest.raises(ValueError, match="returned no loss"):
        gradient_factors(model, parts, {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match="is nan; check the labels"):
        gradient_factors(model, parts, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert_unchanged(model, before)


def test_single_examples():
    batch = {"input_ids": torch.arange(6).reshape(2, 3), "weight": torch.tensor(1.0)}
    first, second = single_examples([batch])
    assert second["input_ids"].tolist() == [[3, 4, 5]]
    assert first["weight"] == second["weight"] == 1
