"""GOAT against the card's identities, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from eckart.adapters.goat import GOAT, route, slices
from eckart.adapters.site import Site

SITE = Site("layer", "linear", 12, 10)
WEIGHT = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
X = torch.randn(4, 7, 10, generator=torch.Generator().manual_seed(1))
G = torch.randn(4, 7, 12, generator=torch.Generator().manual_seed(2))


def start(rank=6, scale=1.0, seed=0, **options):
    adapter = GOAT(**({"experts": 3} | options)).build(SITE, rank, scale)
    adapter.initialize(WEIGHT, None, torch.Generator().manual_seed(seed))
    return adapter


def move(adapter, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapter


def double(tensor):
    return tensor.detach().double().numpy()


def linear():
    base = nn.Linear(10, 12).requires_grad_(False)
    base.weight.data = WEIGHT.clone()
    return base


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def loop(adapter, x, k):
    """The equation, token by token and expert by expert."""
    experts, s = adapter.experts, adapter.scale
    left, right, left0, right0 = (
        np.stack(np.split(double(t), experts, axis))
        for t, axis in ((adapter.left, 1), (adapter.right, 0), (adapter.left_start, 1), (adapter.right_start, 0))
    )
    residual = double(WEIGHT) - s / experts * sum(b @ a for b, a in zip(left0, right0, strict=True))
    out = []
    for token in double(x).reshape(-1, 10):
        p = softmax(double(adapter.router) @ token)
        best = np.argsort(-p)[:k]
        out.append(residual @ token + sum(p[i] / p[best].sum() * s * left[i] @ (right[i] @ token) for i in best))
    return np.stack(out).reshape(*x.shape[:-1], 12)


@pytest.mark.parametrize("choice", ["first", "last", "top", "bottom"])
@pytest.mark.parametrize("scaling", ["theory", "alpha"])
def test_each_expert_starts_from_its_triplets(choice, scaling):
    adapter = start(slices=choice, scaling=scaling, scale=0.5)
    u, s, vh = np.linalg.svd(double(WEIGHT), full_matrices=False)
    used = {
        "first": [[0, 1], [3, 4], [6, 7]],
        "last": [[1, 2], [4, 5], [7, 8]],
        "top": [[0, 1], [2, 3], [4, 5]],
        "bottom": [[4, 5], [6, 7], [8, 9]],
    }[choice]
    assert slices(10, 3, 2, choice).tolist() == used
    assert adapter.scale == pytest.approx(0.5 * np.sqrt(3 * 10 / 2) if scaling == "theory" else 0.5 * 6 / 2)
    left, right = double(adapter.left), double(adapter.right)
    for i, places in enumerate(used):
        mine = slice(2 * i, 2 * i + 2)
        expected = (u[:, places] * s[places]) @ vh[places] / 10
        np.testing.assert_allclose(adapter.scale * left[:, mine] @ right[mine], expected, atol=1e-6)
        np.testing.assert_allclose(left[:, mine].T @ left[:, mine], right[mine] @ right[mine].T, atol=1e-6)
    # Experts are orthogonal to one another.
    for gram in (left.T @ left, right @ right.T):
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-6)


def test_the_scale_of_the_paper():
    wide = Site("layer", "linear", 64, 4096)
    assert GOAT().build(wide, 8, 1.0).scale == pytest.approx(np.sqrt(3 * 4096))
    assert GOAT(eta=0.5).build(wide, 16, 1.0).scale == pytest.approx(np.sqrt(3 * 0.5 * 4096 / 2))
    assert GOAT(scaling="alpha").build(wide, 8, 2.0).scale == 16  # alpha 16, eight experts of rank 1


def test_with_equal_gates_the_layer_is_the_base():
    adapter, base = start(top_k=3), linear()
    adapter.router.data.zero_()
    assert torch.allclose(adapter(X, base), base(X), atol=1e-6)


def test_the_start_is_off_by_the_gates():
    adapter, base = start(rho=5.0), linear()
    u, s, vh = np.linalg.svd(double(WEIGHT), full_matrices=False)
    gates = double(route(X @ adapter.router.T, 2)[0]) - 1 / 3
    weights = np.zeros((4, 7, 10))
    for i, places in enumerate(([0, 1], [3, 4], [6, 7])):
        weights[..., places] = gates[..., [i]]
    expected = (double(X) @ vh.T * weights * s) @ u.T / 5
    found = double(adapter(X, base)) - double(base(X))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found).max() > 0.01


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": 3}, {"scaling": "alpha"}, {"experts": 6}])
def test_the_layer_is_the_equation(options):
    adapter, base = move(start(**options)), linear()
    expected = loop(adapter, X, options.get("top_k", 2)) + double(base.bias)
    np.testing.assert_allclose(double(adapter(X, base)), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(double(adapter(X[0, 0], base)), expected[0, 0], rtol=1e-5, atol=1e-5)


def test_gates():
    logits = 3 * torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    gates, probabilities, chosen = route(logits, 2)
    expected = softmax(double(logits))
    np.testing.assert_allclose(double(probabilities), expected, atol=1e-6)
    kept = np.where(expected >= np.sort(expected)[:, [-2]], expected, 0)
    np.testing.assert_allclose(double(gates), kept / kept.sum(-1, keepdims=True), atol=1e-6)
    assert chosen.sum(-1).tolist() == [2] * 50
    # Far apart, equal, and in half precision's reach: always two, always a sum of one.
    hard = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0], [-300.0, -301.0, -302.0]])
    gates, _, chosen = route(hard, 2)
    assert chosen.sum(-1).tolist() == [2] * 3
    assert torch.allclose(gates.sum(-1), torch.ones(3))


def test_the_count_of_what_is_trained():
    adapter = start()
    assert adapter.num_trainable() == GOAT(experts=3).trainable(SITE, 6) == 6 * 22 + 3 * 10
    assert GOAT().trainable(Site("layer", "linear", 32, 24), 16) == 16 * 56 + 8 * 24
    assert GOAT().build(SITE, 4, 1.0).experts == 4  # one for each rank where there are fewer than eight


def test_a_gradient_reaches_everything():
    adapter, base = start(), linear()
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        (adapter(X, base) * G).sum().backward()
        optimizer.step()
    assert set(before) == {"left", "right", "router"}
    assert [name for name, p in adapter.named_parameters() if torch.equal(p, before[name])] == []
    # An expert that no token chose has none.
    idle = start(top_k=1)
    idle.router.data = torch.stack([X[0, 0], -X[0, 0], torch.zeros(10)])
    (idle(X[0, :1], base) * G[0, :1]).sum().backward()
    assert idle.left.grad[:, :2].any()
    assert not idle.left.grad[:, 2:].any()
    assert not idle.right.grad[2:].any()


def three(**options):
    method = GOAT(**({"experts": 3} | options))
    adapters = {}
    for index in range(3):
        adapter = method.build(Site(f"layers.{index}", "linear", 10, 10), 6, 1.0)
        weight = torch.randn(10, 10, generator=torch.Generator().manual_seed(index))
        adapter.initialize(weight, None, torch.Generator().manual_seed(index))
        adapters[f"layers.{index}"] = adapter
    return adapters, method.coordinate(adapters, seed=0)


def balance(adapter, *inputs, k=2):
    """E Σ f p over all tokens of all inputs."""
    p = softmax(np.concatenate([double(x).reshape(-1, 10) for x in inputs]) @ double(adapter.router).T)
    chosen = p >= np.sort(p)[:, [-k]]
    return p.shape[1] * (chosen.mean(0) * p.mean(0)).sum()


def run(adapters, coordinator, x, training=True, **kwargs):
    coordinator.before_forward(kwargs, training)
    for adapter in adapters.values():
        adapter.update(x)


def test_the_balance_loss():
    adapters, coordinator = three(balance=0.01)
    assert not coordinator.counts_steps
    assert coordinator.penalty() is None
    run(adapters, coordinator, X)
    expected = 0.01 * sum(balance(adapter, X) for adapter in adapters.values())
    loss = coordinator.penalty()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    for adapter in adapters.values():
        p = softmax(double(X).reshape(-1, 10) @ double(adapter.router).T)
        f = (p >= np.sort(p)[:, [-2]]).mean(0)
        gradient = 0.01 * 3 * (p * (f - (p * f).sum(-1, keepdims=True))).T @ double(X).reshape(-1, 10) / 28
        np.testing.assert_allclose(double(adapter.router.grad), gradient, atol=1e-6)
    assert three(balance=0)[1] is None


def test_the_balance_loss_is_k_when_balanced():
    adapters, coordinator = three(balance=1.0)
    eye = 1e-4 * torch.eye(3, 10)
    for adapter in adapters.values():
        adapter.router.data = -eye  # of three tokens each leaves another expert out
    run(adapters, coordinator, torch.eye(10)[:3])
    assert float(coordinator.penalty().detach()) == pytest.approx(3 * 2, rel=1e-4)


def test_the_balance_loss_counts_every_pass_once():
    adapters, coordinator = three()
    inputs = [X, -2 * X[:1]]
    for x in inputs:
        run(adapters, coordinator, x)
    run(adapters, coordinator, 5 * X, training=False)  # an evaluation in between
    with torch.no_grad():
        run(adapters, coordinator, 5 * X)
    expected = 1e-3 * sum(balance(adapter, *inputs) for adapter in adapters.values())
    assert float(coordinator.penalty().detach()) == pytest.approx(expected, rel=1e-5)
    for adapter in adapters.values():  # run again for the gradient
        adapter.update(X)
    assert coordinator.penalty() is None
    run(adapters, coordinator, X[0, 0])  # one token, without a batch
    assert coordinator.penalty() is not None
    # A loop that never reads it does not pile passes up over its steps.
    run(adapters, coordinator, X)
    with torch.no_grad():
        adapters["layers.0"].router.mul_(2)
    run(adapters, coordinator, X[:2])
    expected = 1e-3 * sum(balance(adapter, X[:2]) for adapter in adapters.values())
    assert float(coordinator.penalty().detach()) == pytest.approx(expected, rel=1e-5)


def test_the_balance_loss_has_its_gradient_under_checkpointing():
    gradients = []
    for again in (False, True):
        adapters, coordinator = three(balance=1.0)
        coordinator.before_forward({"attention_mask": torch.ones(4, 7)}, training=True)
        x = X.clone().requires_grad_(True)
        for adapter in adapters.values():
            x = checkpoint(adapter.update, x, use_reentrant=False) if again else adapter.update(x)
        (x.sum() + coordinator.penalty()).backward()
        assert coordinator.penalty() is None
        gradients.append([p.grad for adapter in adapters.values() for p in adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_padded_tokens_do_not_count():
    adapters, coordinator = three()
    mask = torch.ones(4, 7, dtype=torch.int64)
    mask[1, 3:] = mask[2, 1:] = 0
    run(adapters, coordinator, X, attention_mask=mask)
    expected = 1e-3 * sum(balance(adapter, X[mask.bool()]) for adapter in adapters.values())
    assert float(coordinator.penalty().detach()) == pytest.approx(expected, rel=1e-5)
    run(adapters, coordinator, X, attention_mask=torch.zeros(4, 7))
    assert float(coordinator.penalty().detach()) == 0
    run(adapters, coordinator, X.flatten(0, 1), attention_mask=mask)  # the layer sees the tokens in one row
    expected = 1e-3 * sum(balance(adapter, X[mask.bool()]) for adapter in adapters.values())
    assert float(coordinator.penalty().detach()) == pytest.approx(expected, rel=1e-5)
    run(adapters, coordinator, X, attention_mask=mask[:, None])  # not of the tokens: ignored
    expected = 1e-3 * sum(balance(adapter, X) for adapter in adapters.values())
    assert float(coordinator.penalty().detach()) == pytest.approx(expected, rel=1e-5)


def test_the_router_is_float32_under_autocast():
    adapter, base = move(start(top_k=1)), linear()
    adapter.router.data[1] = adapter.router.data[0] * (1 + 1e-3)  # closer than half precision can tell
    seen = []

    class Tally:
        def count(self, name, probabilities, chosen):
            seen.append(chosen)

    adapter.tally = Tally()
    outside = adapter(X, base)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = adapter(X, base)
        low = route(torch.nn.functional.linear(X, adapter.router).float(), 1)[2]
    assert inside.dtype == torch.bfloat16
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], low)
    assert float((inside - outside).detach().norm() / outside.detach().norm()) < 0.02  # a few roundings to 8 bits


def test_it_has_no_one_weight():
    assert not GOAT.mergeable
    assert start().low_rank() is None
    with pytest.raises(ValueError, match="layer: a router picks the experts"):
        start().delta(WEIGHT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"experts": 1}, "experts must be at least top_k = 2, not 1"),
        ({"slices": "all"}, "slices must be one of first, last, top, bottom, not 'all'"),
        ({"scaling": "goat"}, "scaling must be one of theory, alpha, not 'goat'"),
        ({"eta": 0}, "eta must be a number above 0"),
        ({"rho": float("nan")}, "rho must be a number above 0"),
        ({"balance": -1}, "balance must be a number of at least 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        GOAT(**options)


def test_ranks_that_do_not_fit():
    assert GOAT(experts=3).check(SITE, 6) is None
    assert "has rank 5 for 3 experts" in GOAT(experts=3).check(SITE, 5)
    assert "1 experts, fewer than top_k = 2" in GOAT().check(SITE, 1)
    assert "rank must be 1 to 10, not 11" in GOAT().check(SITE, 11)
