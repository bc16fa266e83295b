"""FLoRA: the Tucker form against NumPy, for linear maps and for convolutions without a dense kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.flora import FLoRA
from eckart.adapters.site import Site, site_of

LINEAR = Site("layer", "linear", 12, 10)


def made(site: Site, method: FLoRA | None = None, rank: int = 3, scale: float = 0.5):
    method = FLoRA() if method is None else method
    adapter = method.build(site, rank, scale)
    adapter.initialize(torch.zeros(1), None, torch.Generator().manual_seed(0))
    assert adapter.num_trainable() == method.trainable(site, rank)
    return adapter


def moved(site: Site, **settings):
    adapter = made(site, **settings)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return adapter


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def test_a_linear_map():
    adapter, base = moved(LINEAR), nn.Linear(10, 12)
    expected = 0.5 * numbers(adapter.outputs) @ numbers(adapter.core) @ numbers(adapter.inputs).T
    assert np.abs(numbers(adapter.delta(torch.zeros(1))) - expected).max() < 1e-5
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(2))
    assert np.abs(numbers(adapter(x, base)) - numbers(base(x)) - numbers(x) @ expected.T).max() < 1e-4
    assert FLoRA().trainable(LINEAR, 3) == 3 * (12 + 10) + 9


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
        {"kernel_size": (1, 5), "padding": (0, 2)},
        {"kernel_size": 1},
    ],
)
def test_a_convolution(options):
    torch.manual_seed(0)
    base = nn.Conv2d(6, 8, **options)
    site = site_of("layer", base)
    adapter = moved(site)
    height, width = site.kernel
    parts = [numbers(getattr(adapter, name)) for name in ("core", "outputs", "inputs", "rows", "columns")]
    whole = 0.5 * np.einsum("abcd,oa,ib,hc,wd->oihw", *parts)
    assert np.abs(numbers(adapter.delta(torch.zeros(1))) - whole.reshape(8, -1)).max() < 1e-4
    assert adapter.num_trainable() == 3 * 14 + sum(k * min(2, k) for k in (height, width)) + 9 * min(2, height) * min(
        2, width
    )
    x = torch.randn(2, 6, 12, 14, generator=torch.Generator().manual_seed(2))
    dense = nn.Conv2d(6, 8, bias=False, **options).double()
    dense.weight.data = torch.tensor(whole)
    difference = numbers(adapter(x, base)) - numbers(base(x)) - numbers(dense(x.double()))
    assert np.abs(difference).max() < 1e-4 * np.abs(numbers(dense(x.double()))).max()
    left, right = adapter.low_rank()
    assert np.abs(numbers(left @ right) - whole.reshape(8, -1)).max() < 1e-4
    # The rank of each unfolding is at most that of its axis.
    for axis, largest in enumerate((3, 3, 2, 2)):
        unfolding = np.moveaxis(whole, axis, 0).reshape(whole.shape[axis], -1)
        assert np.linalg.matrix_rank(unfolding) <= largest


@pytest.mark.parametrize("init", ["kaiming", "normal"])
def test_the_start_and_what_moves_first(init):
    adapter, base = made(LINEAR, method=FLoRA(init=init), rank=5), nn.Linear(10, 12)
    x = torch.randn(4, 10)
    assert torch.equal(adapter(x, base), base(x))
    # Kaiming normal with a = √3 over r inputs: variance 2 / (1 + 3) / r.
    wanted = 0.02 if init == "normal" else (0.5 / 5) ** 0.5
    drawn = torch.cat([adapter.outputs.flatten(), adapter.inputs.flatten()])
    assert abs(float(drawn.detach().std()) / wanted - 1) < 0.25  # 110 numbers
    adapter(x, base).square().sum().backward()
    assert float(adapter.core.grad.abs().max()) > 0
    assert float(adapter.outputs.grad.abs().max()) == float(adapter.inputs.grad.abs().max()) == 0


def test_an_update_of_tucker_rank_is_found_where_a_flat_one_of_equal_size_is_not():
    """16 channels to 16, 3 x 3: what 348 numbers hold exactly, a flat product of 320 misses by more than a tenth."""
    site = Site("layer", "conv2d", 16, 16 * 9, (3, 3))
    target = numbers(moved(site, rank=6, scale=1.0).delta(torch.zeros(1)))
    flat_rank = FLoRA().trainable(site, 6) // (16 + 144)
    assert flat_rank == 2
    s = np.linalg.svd(target, compute_uv=False)
    assert (s[flat_rank:] ** 2).sum() > 0.1 * (s**2).sum()


def test_what_does_not_fit():
    assert "input channels, so its rank" in FLoRA().check(Site("layer", "conv2d", 16, 4 * 9, (3, 3)), 5)
    with pytest.raises(ValueError, match="kernel_rank must be at least 1"):
        FLoRA(kernel_rank=0)
    with pytest.raises(ValueError, match="init must be one of kaiming, normal"):
        FLoRA(init="zeros")
