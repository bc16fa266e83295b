"""LoRA's limits: the chained gradient against autograd, and the sizes of queries and keys against their definition."""

from __future__ import annotations

import math

import pytest
import torch

from eckart import analyze
from eckart.analysis.chained_gradient import (
    chained_gradients,
    dense_gradients,
    lora_gradients,
    num_features,
    taylor_features,
)
from tiny_models import FAMILIES


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _head(length: int, gamma: float):
    """Inputs, maps and target of a head of which the entries of queries and keys reach ``gamma``."""
    x, y = _draw(length, 6), _draw(length, 3, seed=4)
    maps = [_draw(6, 4, seed=1), _draw(6, 4, seed=2), _draw(6, 3, seed=3)]
    maps[:2] = [w * gamma / float((x @ w).abs().max()) for w in maps[:2]]
    return x, *maps, y


def _by_autograd(x, query, key, value, y, *, causal):
    parts = [w.clone().requires_grad_() for w in (query, key, value)]
    logits = (x @ parts[0]) @ (x @ parts[1]).mT
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits).triu(1) > 0, -math.inf)
    loss = (logits.softmax(1) @ x @ parts[2] - y).square().sum() / 2
    return torch.autograd.grad(loss, parts)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("degree", "bound"), [(2, 2e-2), (4, 2e-4), (6, 2e-6)])
def test_chained_gradient_tends_to_that_of_autograd(causal, degree, bound):
    head = _head(120, 0.5)
    wanted = _by_autograd(*head, causal=causal)
    found = chained_gradients(*head, degree, causal=causal)
    for one, other in zip(found[1:], wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < bound
    for one, other in zip(dense_gradients(*head, causal=causal)[1:], wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_large_entries_are_beyond_it():
    """The transition of the paper: the same degree is of no use for entries of 3."""
    head = _head(120, 3.0)
    wanted = _by_autograd(*head, causal=False)[0]
    assert float((chained_gradients(*head, 4).query - wanted).norm() / wanted.norm()) > 1e-2


def test_features_are_the_truncated_exponential():
    q, k = _draw(5, 3), _draw(7, 3, seed=1)
    products = q @ k.mT
    wanted = sum(products**j / math.factorial(j) for j in range(5))
    found = taylor_features(q, 4)
    torch.testing.assert_close(found @ taylor_features(k, 4).mT, wanted)
    assert found.shape[1] == num_features(3, 4) == math.comb(7, 4)


def test_gradients_of_the_adapter():
    up, down, target = _draw(6, 2), _draw(2, 4, seed=1), _draw(6, 4, seed=2)
    parts = [up.clone().requires_grad_(), down.clone().requires_grad_()]
    weight = 0.5 * parts[0] @ parts[1]
    loss = (weight - target).square().sum() / 2
    wanted = torch.autograd.grad(loss, parts)
    for one, other in zip(lora_gradients((weight - target).detach(), up, down, 0.5), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_odd_degrees_are_refused():
    with pytest.raises(ValueError, match="degree must be even"):
        chained_gradients(*_head(8, 0.5), 3)


def test_sizes_grow_with_the_weights():
    """Queries twice as large: the threshold's ratio rises by the root of two, for every head."""
    ids = torch.arange(3, 15).unsqueeze(0)
    model = FAMILIES["llama"]()
    before = analyze(model, "lora-limits", data=[ids], progress=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 2
    after = analyze(model, "lora-limits", data=[ids], progress=False)
    assert len(before.rows) == len(after.rows)
    first = before.rows[0], after.rows[0]  # later layers see other inputs
    assert first[1]["gamma_q"] == pytest.approx(2 * first[0]["gamma_q"], rel=1e-5)
    assert first[1]["gamma_k"] == pytest.approx(first[0]["gamma_k"], rel=1e-5)
    assert first[1]["ratio"] == pytest.approx(2**0.5 * first[0]["ratio"], rel=1e-5)
