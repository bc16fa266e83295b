"""PaCA against training of the columns themselves, in float64, and against LoRA in what it remembers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.factored import FactoredAdapter
from eckart.adapters.paca import PaCA, choose_columns
from eckart.adapters.site import Site

SITE = Site("layer", "linear", 12, 10)
WEIGHT = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
X = torch.randn(4, 7, 10, generator=torch.Generator().manual_seed(1))
G = torch.randn(4, 7, 12, generator=torch.Generator().manual_seed(2))


def start(scale=1.0, seed=0, **options):
    adapter = PaCA(**options).build(SITE, 3, scale)
    adapter.initialize(WEIGHT, None, torch.Generator().manual_seed(seed))
    return adapter


def linear(weight=WEIGHT):
    base = nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
    base.weight.data = weight.clone()
    return base


def double(tensor):
    return tensor.detach().double().numpy()


def test_nothing_changes_at_the_start():
    adapter, base = start(), linear()
    assert torch.equal(adapter(X, base), base(X))
    assert adapter.num_trainable() == PaCA().trainable(SITE, 3) == 36


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_it_trains_as_the_columns_themselves_do(scale):
    """P = W_I / c under SGD, as in the paper: P's gradient is c gᵀ x_I, of the full gradient the chosen columns."""
    adapter, base = start(scale), linear()
    chosen = adapter.chosen.numpy()
    weight, x, g = double(WEIGHT), double(X).reshape(-1, 10), double(G).reshape(-1, 12)
    p = weight[:, chosen] / scale
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        y = adapter(X, base)
        (y * y * G).sum().backward()
        current = weight.copy()
        current[:, chosen] = scale * p
        full = (2 * g * (x @ current.T + double(base.bias))).T @ x
        np.testing.assert_allclose(double(adapter.columns.grad), scale * full[:, chosen], rtol=1e-4, atol=1e-3)
        optimizer.step()
        p -= 0.01 * scale * full[:, chosen]
    after = double(WEIGHT + adapter.delta(WEIGHT))
    assert np.abs(after[:, chosen] - weight[:, chosen]).min() > 0
    np.testing.assert_allclose(after[:, chosen], scale * p, atol=1e-4)
    others = np.setdiff1d(np.arange(10), chosen)
    assert np.array_equal(after[:, others], weight[:, others])  # to the bit
    np.testing.assert_allclose(double(adapter(X, base)), double(X) @ after.T + double(base.bias), atol=1e-4)
    left, right = adapter.low_rank()
    assert torch.equal(left @ right, adapter.delta(WEIGHT))
    assert right.sum(dim=1).tolist() == [1, 1, 1]
    assert adapter.columns.count_nonzero() == 36


def test_gradient_of_the_input_is_that_of_the_whole_weight():
    adapter, base = start(), linear()
    adapter.columns.data += 0.3
    x = X.clone().requires_grad_()
    (adapter(x, base) * G).sum().backward()
    np.testing.assert_allclose(double(x.grad), double(G) @ double(WEIGHT + adapter.delta(WEIGHT)), atol=1e-5)


class LoRA(FactoredAdapter):
    def initialize(self, *unused):
        self.set_factors(left=torch.ones_like(self.left), right=torch.ones_like(self.right))


def saved_bytes(adapter, base, x):
    """Bytes of activations that autograd keeps: each storage once, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for m in (adapter, base) for t in m.state_dict().values()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapter(x, base)
    return sum(tensor.numel() * tensor.element_size() for address, tensor in kept.items() if address not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_chosen_inputs_are_remembered(dtype):
    width, tokens, rank = 64, 512, 4
    site = Site("layer", "linear", width, width)
    weight = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    base = linear(weight).to(dtype)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()
    paca = PaCA().build(site, rank, 1.0)
    paca.initialize(weight, None, torch.Generator().manual_seed(0))
    lora = LoRA(site, rank, trained=("left", "right"))
    lora.initialize()
    chosen, factor = tokens * rank * 4, width * rank * 4  # float32; the factor is c D
    assert chosen <= saved_bytes(paca, base, x) <= chosen + factor
    # LoRA keeps the whole input in float32, and the inner features.
    assert tokens * width * 4 + chosen <= saved_bytes(lora, base, x)


def test_selection():
    norms = WEIGHT.norm(dim=0).tolist()
    order = sorted(range(10), key=norms.__getitem__)
    assert start(selection="smallest").chosen.tolist() == sorted(order[:3])
    assert start(selection="largest").chosen.tolist() == sorted(order[-3:])
    assert start().chosen.tolist() == start().chosen.tolist()
    draws = [tuple(start(seed=seed).chosen.tolist()) for seed in range(20)]
    assert all(len(set(draw)) == 3 for draw in draws)
    assert len(set(draws)) > 10
    assert set().union(*draws) == set(range(10))
    assert choose_columns(WEIGHT, 10, "random", torch.Generator()).tolist() == list(range(10))
    with pytest.raises(ValueError, match="selection must be one of random, largest, smallest, not 'best'"):
        PaCA(selection="best")


def test_another_dtype_does_not_round_the_indices():
    site = Site("layer", "linear", 2, 2000)
    adapter = PaCA(selection="largest").build(site, 2, 1.0)
    adapter.initialize(torch.arange(2000.0).expand(2, 2000), None, torch.Generator())
    assert adapter.to(torch.bfloat16).chosen.tolist() == [1998, 1999]


def test_autocast():
    adapter = start()
    adapter.columns.data += 0.3
    base = linear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = adapter(X, base)
    assert inside.dtype == torch.bfloat16
    outside = adapter(X, base)
    assert float((inside - outside).detach().norm() / outside.detach().norm()) < 0.02  # a few roundings to 8 bits
