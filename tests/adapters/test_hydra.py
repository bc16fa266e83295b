"""Hydra against the card's identities, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.hydra import Hydra
from eckart.adapters.site import Site
from every_kind import every_kind

SITE = Site("layer", "linear", 12, 10)
WEIGHT = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
X = torch.randn(7, 10, generator=torch.Generator().manual_seed(1))


def start(scale=1.0, rank=3, **options):
    adapter = Hydra(**options).build(SITE, rank, scale)
    adapter.initialize(WEIGHT, None, torch.Generator().manual_seed(0))
    return adapter


def move(adapter):
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapter


def double(tensor):
    return tensor.detach().double().numpy()


def linear(bias=True):
    base = nn.Linear(10, 12, bias=bias)
    base.weight.data = WEIGHT.clone()
    if bias:
        base.bias.data = torch.randn(12, generator=torch.Generator().manual_seed(4))
    return base


def branches(adapter):
    """ΔP (out, in) and ΔS (out, out)."""
    parallel = double(adapter.parallel_up) @ double(adapter.parallel_down) if adapter.p else np.zeros((12, 10))
    sequential = double(adapter.sequential_up) @ double(adapter.sequential_down) if adapter.q else np.zeros((12, 12))
    return parallel, sequential


RANKS = [{}, {"parallel": 0}, {"sequential": 0}, {"parallel": 1, "sequential": 4}]


@pytest.mark.parametrize("options", RANKS)
@pytest.mark.parametrize("read_bias", [True, False])
def test_nothing_changes_at_the_start(options, read_bias):
    adapter, base = start(read_bias=read_bias, **options), linear()
    assert torch.equal(adapter(X, base), base(X))
    p, q = options.get("parallel", 3), options.get("sequential", 3)
    assert adapter.num_trainable() == Hydra(**options).trainable(SITE, 3) == p * 22 + q * 24


@pytest.mark.parametrize("options", RANKS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_layer_has_the_merged_weight(options, scale):
    adapter, base = move(start(scale, **options)), linear()
    parallel, sequential = branches(adapter)
    w = double(WEIGHT)
    merged = w + scale * (parallel + sequential @ w)
    np.testing.assert_allclose(double(WEIGHT + adapter.delta(WEIGHT)), merged, atol=1e-5)
    np.testing.assert_allclose(double(adapter(X, base)), double(X) @ merged.T + double(base.bias), atol=1e-5)
    if options == {"parallel": 0}:
        np.testing.assert_allclose(merged, (np.eye(12) + scale * sequential) @ w, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_reading_the_bias_is_the_paper_and_the_same_without_one(bias):
    """f + p + q with q of f itself: b' = b + c ΔS b."""
    adapter, base = move(start(0.5, read_bias=True)), linear(bias)
    parallel, sequential = branches(adapter)
    f = double(base(X))
    expected = f + 0.5 * (double(X) @ parallel.T + f @ sequential.T)
    np.testing.assert_allclose(double(adapter(X, base)), expected, atol=1e-5)
    w = double(WEIGHT)
    b = double(base.bias) if bias else np.zeros(12)
    merged = double(X) @ (w + 0.5 * (parallel + sequential @ w)).T + b + 0.5 * sequential @ b
    np.testing.assert_allclose(expected, merged, atol=1e-5)
    without = move(start(0.5))(X, base)
    assert torch.allclose(without, adapter(X, base), atol=1e-5) == (not bias)
    with pytest.raises(ValueError, match=r"layer: the sequential branch reads the bias.*use read_bias=False"):
        adapter.delta(WEIGHT)


def test_rank_and_row_space():
    weight = WEIGHT.clone()
    weight[:, 5:] = weight[:, :5]  # of rank 5
    adapter = move(start(parallel=2, sequential=3))
    parallel, _ = branches(adapter)
    delta = double(adapter.delta(weight))
    assert np.linalg.matrix_rank(delta, tol=1e-4) == 5
    alone = delta - parallel
    assert np.linalg.matrix_rank(alone, tol=1e-4) == 3
    rows = np.linalg.svd(double(weight))[2][:5]
    np.testing.assert_allclose(alone @ rows.T @ rows, alone, atol=1e-5)
    assert np.abs(parallel @ rows.T @ rows - parallel).max() > 0.1
    assert adapter.low_rank() is None
    left, right = move(start(0.5, sequential=0)).low_rank()
    lora = move(start(0.5, sequential=0))
    assert (left.shape, right.shape) == ((12, 3), (3, 10))
    assert torch.equal(left @ right, lora.low_rank()[0] @ lora.low_rank()[1])
    np.testing.assert_allclose(double(left @ right), 0.5 * branches(lora)[0], atol=1e-6)


def test_gradient_of_the_sequential_branch():
    """dL/dU_s = c Σ g (D_s (f - b))ᵀ; D has none at first, as in LoRA."""
    adapter, base = start(0.5), linear()
    g = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    (adapter(X, base) * g).sum().backward()
    inner = double(X) @ double(WEIGHT).T @ double(adapter.sequential_down).T
    np.testing.assert_allclose(double(adapter.sequential_up.grad), 0.5 * double(g).T @ inner, atol=1e-4)
    assert not adapter.sequential_down.grad.any()
    assert not adapter.parallel_down.grad.any()
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    optimizer.step()
    optimizer.zero_grad()
    (adapter(X, base) * g).sum().backward()
    optimizer.step()
    assert [name for name, p in adapter.named_parameters() if torch.equal(p, before[name])] == []


def test_convolution_and_embedding():
    for adapter in every_kind(Hydra(), 0.5):
        move(adapter)


def test_the_three_starts():
    for init, largest in (("kaiming", 10**-0.5), ("xavier", (6 / 13) ** 0.5)):  # uniform in ± largest
        value = float(start(init=init).parallel_down.detach().abs().max())
        assert 0.8 * largest < value <= largest
    site = Site("layer", "linear", 100, 100)
    adapter = Hydra(init="normal").build(site, 50, 1.0)
    adapter.initialize(torch.zeros(100, 100), None, torch.Generator().manual_seed(0))
    for part in (adapter.parallel_down, adapter.sequential_down):
        assert float(part.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_options():
    for name in ("parallel", "sequential"):
        with pytest.raises(ValueError, match=f"{name} must be a rank, or 0 for none, not -1"):
            Hydra(**{name: -1})
    with pytest.raises(ValueError, match="both 0: nothing is left to train"):
        Hydra(parallel=0, sequential=0)
    with pytest.raises(ValueError, match="init must be one of kaiming, xavier, normal, not 'zero'"):
        Hydra(init="zero")
    assert "parallel must be at most that rank, not 11" in Hydra(parallel=11).check(SITE, 3)
    assert "sequential must be at most that rank, not 13" in Hydra(sequential=13).check(SITE, 3)
    assert Hydra(sequential=12).check(SITE, 3) is None
    assert "rank must be 1 to 10, not 11" in Hydra().check(SITE, 11)


def test_autocast():
    adapter = move(start())
    base = linear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = adapter(X, base)
    assert inside.dtype == torch.bfloat16
    outside = adapter(X, base)
    assert float((inside - outside).detach().norm() / outside.detach().norm()) < 0.02  # a few roundings to 8 bits
