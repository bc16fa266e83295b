"""The chained gradient against autograd of the softmax itself, and the identities that it is made of."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from eckart.analysis.chained_gradient import (
    chained_gradients,
    dense_gradients,
    lora_gradients,
    masked_product,
    num_features,
    taylor_degree,
    taylor_features,
)


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _problem(gamma, tokens=400, width=4, inner=4, seed=0):
    """A head whose queries and keys have entries up to gamma."""
    x = _draw(tokens, inner, seed=seed)
    query, key, value = (_draw(inner, width, seed=seed + i) for i in (10, 20, 30))
    query, key = (w * gamma / (x @ w).abs().max() for w in (query, key))
    return x, query, key, value, _draw(tokens, width, seed=seed + 40)


def _autograd(x, query, key, value, target, beta, causal):
    weights = [w.clone().requires_grad_() for w in (query, key, value)]
    scores = beta * (x @ weights[0]) @ (x @ weights[1]).T
    if causal:
        scores = scores + torch.full_like(scores, -torch.inf).triu(1)
    loss = ((scores.softmax(-1) @ (x @ weights[2]) - target) ** 2).sum() / 2
    return [loss, *torch.autograd.grad(loss, weights)]


def _error(found, expected):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("inner", "width", "beta"), [(4, 4, 1.0), (7, 3, 0.6)])
def test_equal_to_autograd_at_a_high_degree(causal, inner, width, beta):
    problem = _problem(1.0, tokens=100, width=width, inner=inner)
    expected = _autograd(*problem, beta, causal)
    assert _error(dense_gradients(*problem, beta=beta, causal=causal), expected) < 1e-13
    found = chained_gradients(*problem, 14 if width < 4 else 12, beta=beta, causal=causal, chunk=32)
    assert _error(found, expected) < 1e-10


@pytest.mark.parametrize("causal", [False, True])
def test_errors_fall_with_the_degree_and_the_threshold_shows(causal):
    """The orders of magnitude that are known for L = 400, d = 4: 1.3e-4, 8e-8, 5e-11 at 0.5, and no use at 3."""
    errors = {}
    for gamma, degree in itertools.product((0.5, 1.0, 3.0), (2, 4, 6)):
        worst = []
        for seed in range(3):
            problem = _problem(gamma, seed=100 * seed)
            expected = dense_gradients(*problem, causal=causal)
            worst.append(_error(chained_gradients(*problem, degree, causal=causal), expected))
        errors[gamma, degree] = sorted(worst)[1]
    assert all(errors[0.5, g] < bound for g, bound in ((2, 3e-3), (4, 1e-5), (6, 3e-8)))
    for gamma in (0.5, 1.0):
        assert errors[gamma, 2] > 10 * errors[gamma, 4] > 100 * errors[gamma, 6]
    assert min(errors[3.0, g] for g in (2, 4, 6)) > 0.02
    for g in (2, 4, 6):
        assert errors[0.5, g] < errors[1.0, g] / 10 < errors[3.0, g] / 100


def test_factors_of_an_adapter():
    """W = W* + (alpha / r) B A through autograd."""
    x, query, key, value, target = _problem(0.5, tokens=50)
    up, down, scale = (0.1 * _draw(4, 2, seed=5)).requires_grad_(), _draw(2, 4, seed=6).requires_grad_(), 1.5
    q, k, v = x @ (query + scale * up @ down), x @ key, x @ value
    loss = (((q @ k.T).softmax(-1) @ v - target) ** 2).sum() / 2
    expected = torch.autograd.grad(loss, (up, down))
    with torch.no_grad():
        found = chained_gradients(x, query + scale * up @ down, key, value, target, 12)
        factors = lora_gradients(found.query, up, down, scale)
    assert _error(factors, expected) < 1e-8


def test_identities():
    a1, b1, a2, b2 = (_draw(9, width, seed=seed) for seed, width in enumerate((3, 3, 4, 4)))
    rows = (a1[:, :, None] * a2[:, None]).flatten(1) @ (b1[:, :, None] * b2[:, None]).flatten(1).T
    assert torch.allclose(rows, (a1 @ b1.T) * (a2 @ b2.T), rtol=1e-13)
    q, k = 0.5 * _draw(6, 3, seed=7), 0.5 * _draw(6, 3, seed=8)
    for degree in range(5):
        product = taylor_features(q, degree) @ taylor_features(k, degree).T
        series = sum((q @ k.T) ** j / math.factorial(j) for j in range(degree + 1))
        assert torch.allclose(product, series, rtol=1e-12)
        assert taylor_features(q, degree).shape[1] == num_features(3, degree)
    assert [num_features(4, g) for g in (2, 4, 6)] == [15, 70, 210]
    z = _draw(9, 5, seed=9)
    for chunk in (1, 4, 64):
        found = masked_product(a1, b1, z, causal=True, chunk=chunk)
        assert torch.allclose(found, (a1 @ b1.T).tril() @ z, rtol=1e-11)


@pytest.mark.parametrize("bound", [0.1, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("eps", [1e-2, 1e-6])
def test_degree_is_the_smallest_that_keeps_its_promise(bound, eps):
    degree = taylor_degree(bound, eps)
    assert degree % 2 == 0

    def promised(g):
        return (g + 1) * math.log(bound) - math.lgamma(g + 2) <= math.log(eps) - bound

    assert promised(degree)
    assert degree == 0 or not promised(degree - 2)
    series = math.fsum((-bound) ** j / math.factorial(j) for j in range(degree + 1))
    if bound < 10:  # beyond, the alternating sum has no digits left in float64
        assert abs(series - math.exp(-bound)) <= eps * math.exp(-bound) * (1 + 1e-9)


def test_odd_degrees_and_scales_without_a_root_are_refused():
    problem = _problem(1.0, tokens=5)
    with pytest.raises(ValueError, match="degree must be even"):
        chained_gradients(*problem, 3)
    with pytest.raises(ValueError, match="beta must be positive"):
        chained_gradients(*problem, 2, beta=0.0)
