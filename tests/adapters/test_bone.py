"""Bone against its definition by loops, in float64, and against PEFT's MiSS."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import MissConfig, get_peft_model
from torch import nn

from eckart.adapters.bone import Bone, block_affine
from eckart.adapters.site import Site

SITE = Site("layer", "linear", 12, 20)
WEIGHT = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
X = torch.randn(3, 7, 20, generator=torch.Generator().manual_seed(1))
FORMS = [Bone(), Bone(along="columns"), Bone(form="bone")]


def start(method, scale=1.0, rank=4, site=SITE):
    adapter = method.build(site, rank, scale)
    adapter.initialize(torch.ones(site.out_features, site.in_features), None, torch.Generator())
    return adapter


def move(adapter):
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapter


def double(tensor):
    return tensor.detach().double().numpy()


def linear(bias=True, weight=WEIGHT):
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=bias).requires_grad_(False)
    base.weight.data = weight.clone()
    if bias:
        base.bias.data = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(4))
    return base


def changed(w, adapter, method, r=4):
    """W' of the paper, block by block."""
    out = w.copy()
    for i in range(0, w.shape[0], r):
        for j in range(0, w.shape[1], r):
            beta = double(adapter.blocks)[(i if method.along == "rows" else j) // r]
            out[i : i + r, j : j + r] += adapter.scale * (w[i : i + r, j : j + r] @ beta + beta)
    return out


@pytest.mark.parametrize("method", FORMS, ids=str)
def test_nothing_changes_at_the_start(method):
    adapter, base = start(method), linear()
    assert torch.equal(adapter(X, base), base(X))
    assert adapter.num_trainable() == method.trainable(SITE, 4) == 4 * (20 if method.along == "columns" else 12)


@pytest.mark.parametrize("method", FORMS[:2], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_block_affine_is_the_papers(method, scale, bias):
    adapter, base = move(start(method, scale)), linear(bias)
    expected = changed(double(WEIGHT), adapter, method)
    np.testing.assert_allclose(double(WEIGHT + adapter.delta(WEIGHT)), expected, atol=1e-5)
    y = double(X) @ expected.T + (double(base.bias) if bias else 0)
    np.testing.assert_allclose(double(adapter(X, base)), y, atol=2e-5)
    np.testing.assert_allclose(double(adapter(X[0, 0], base)), y[0, 0], atol=2e-5)
    assert np.linalg.matrix_rank(double(adapter.delta(WEIGHT)), tol=1e-4) == 12  # full, with r = 4
    assert adapter.low_rank() is None


@pytest.mark.parametrize("method", FORMS[:2], ids=str)
def test_block_affine_can_be_undone(method):
    """W_ij = (W'_ij - β)(I + β)⁻¹."""
    adapter = move(start(method))
    merged = double(WEIGHT + adapter.delta(WEIGHT))
    tiles = merged.reshape(3, 4, 5, 4).transpose(0, 2, 1, 3)
    beta = double(adapter.blocks)
    beta = beta[:, None] if method.along == "rows" else beta[None]
    undone = ((tiles - beta) @ np.linalg.inv(np.eye(4) + beta)).transpose(0, 2, 1, 3).reshape(12, 20)
    np.testing.assert_allclose(undone, double(WEIGHT), atol=1e-4)


@pytest.mark.parametrize("width", [20, 18, 4])
def test_linear_form_is_a_lora_of_summed_chunks(width):
    site = Site("layer", "linear", 12, width)
    adapter = move(start(Bone(form="bone"), 0.5, site=site))
    x = X[..., :width]
    chunks = [double(x[..., j : j + 4]) for j in range(0, width, 4)]
    summed = sum(np.pad(chunk, ((0, 0), (0, 0), (0, 4 - chunk.shape[-1]))) for chunk in chunks)
    expected = 0.5 * summed @ double(adapter.shared)
    np.testing.assert_allclose(double(adapter.update(x)), expected, atol=1e-5)
    delta = adapter.delta(torch.zeros(12, width))
    np.testing.assert_allclose(double(x) @ double(delta).T, expected, atol=1e-5)
    assert np.linalg.matrix_rank(double(delta), tol=1e-4) == 4
    left, right = adapter.low_rank()
    np.testing.assert_allclose(double(left), 0.5 * double(adapter.shared).T)
    assert right.tolist() == [[float(column % 4 == row) for column in range(width)] for row in range(4)]


@pytest.mark.parametrize(("method", "init", "name"), [(Bone(), "bat", "blocks"), (Bone(form="bone"), True, "shared")])
def test_peft_has_the_same(method, init, name):
    adapter, base = move(start(method)), linear()
    expected = adapter(X, base)
    model = get_peft_model(nn.Sequential(linear()), MissConfig(r=4, init_weights=init, target_modules=["0"]))
    block = model.base_model.model[0].miss_block["default"]
    block.data.copy_(getattr(adapter, name))
    assert torch.allclose(model(X), expected, atol=2e-5)
    merged = model.merge_and_unload()[0].weight
    assert torch.allclose(merged, WEIGHT + adapter.delta(WEIGHT), atol=1e-5)


@pytest.mark.parametrize("method", FORMS, ids=str)
def test_gradients_are_those_of_the_dense_change(method):
    """There at once, since nothing is multiplied by a zero."""
    adapter, base = start(method, 0.5), linear()
    for point in range(2):
        x = X.clone().requires_grad_()
        g = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(2))
        (adapter(x, base) * g).sum().backward()
        (trained,) = adapter.parameters()
        assert bool((trained.grad != 0).all())
        found, trained.grad = trained.grad, None
        dense = X.clone().requires_grad_()
        ((dense @ (WEIGHT + adapter.delta(WEIGHT)).mT) * g).sum().backward()
        assert torch.allclose(found, trained.grad, rtol=1e-4, atol=1e-4), point
        assert torch.allclose(x.grad, dense.grad, rtol=1e-4, atol=1e-4), point
        trained.grad = None
        move(adapter)


def test_nothing_of_the_size_of_the_weight_is_kept():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    site, base = Site("layer", "linear", 64, 64), linear(weight=weight)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for method in FORMS:
        sizes = []

        def pack(tensor, sizes=sizes):
            if tensor.untyped_storage().data_ptr() != base.weight.untyped_storage().data_ptr():
                sizes.append(tensor.numel())
            return tensor

        adapter = move(start(method, site=site))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            adapter(x, base)
        assert 0 < max(sizes) < 64 * 64 / 4, method


def test_the_bias_does_not_spoil_the_weight_that_is_read_in_half_precision():
    base = linear().to(torch.bfloat16)
    base.bias.data += 3
    x = torch.eye(20, dtype=torch.bfloat16)
    adapter = move(start(Bone()))
    read = adapter._from_weight(x, base).detach().mT
    exact = adapter.delta(base.weight.float()).detach()
    # One part in 256 is what bfloat16 holds of a sum of the bias and 256 W.
    assert float((read - exact).norm() / exact.norm()) < 1 / 256
    assert adapter(x, base).dtype == torch.bfloat16


def test_a_weight_of_no_blocks_is_refused():
    assert "rank 5 does not divide both" in Bone().check(SITE, 5)
    assert 'form="bone"' in Bone(along="columns").check(Site("layer", "linear", 12, 18), 4)
    assert Bone(form="bone").check(SITE, 5) is None
    assert Bone().check(SITE, 4) is None
    assert "rank must be 1 to 12, not 13" in Bone(form="bone").check(SITE, 13)
    assert torch.equal(block_affine(WEIGHT, torch.zeros(3, 4, 4), "rows"), torch.zeros(12, 20))
    with pytest.raises(ValueError, match="form must be one of bat, bone, not 'miss'"):
        Bone(form="miss")
    with pytest.raises(ValueError, match="along must be one of rows, columns, not 'both'"):
        Bone(along="both")


@pytest.mark.parametrize("method", FORMS, ids=str)
def test_autocast(method):
    adapter, base = move(start(method)), linear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = adapter(X, base)
    assert inside.dtype == torch.bfloat16
    outside = adapter(X, base)
    assert float((inside - outside).detach().norm() / outside.detach().norm()) < 0.02  # a few roundings to 8 bits
