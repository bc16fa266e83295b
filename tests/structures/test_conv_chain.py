from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from eckart.structures.conv_chain import ConvChain, ConvStep, conv_macs

STEPS = {
    "separable": [ConvStep(4, 3, (1, 5), (1, 2), (0, 2)), ConvStep(3, 6, (3, 1), (2, 1), (1, 0))],
    "grouped": [ConvStep(4, 6, (3, 5), (2, 1), (1, 2), groups=2), ConvStep(6, 5)],
    "four": [
        ConvStep(4, 3),
        ConvStep(3, 3, (3, 1), (1, 1), (1, 0), (2, 1), groups=3),
        ConvStep(3, 3, (1, 3), (1, 2), (0, 0), (1, 3), groups=3),
        ConvStep(3, 7),
    ],
    "same": [ConvStep(4, 3, (1, 4), padding="same"), ConvStep(3, 6, (3, 1), padding="same")],
    "valid": [ConvStep(4, 3, padding="valid"), ConvStep(3, 6, (3, 2), padding="valid")],
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def chain_of(name: str, biased: bool = True) -> ConvChain:
    steps = STEPS[name]
    kernels = [
        random(step.out_channels, step.in_channels // step.groups, *step.kernel_size, seed=i)
        for i, step in enumerate(steps)
    ]
    return ConvChain.from_kernels(steps, kernels, bias=random(steps[-1].out_channels, seed=9) if biased else None)


@pytest.fixture(params=STEPS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("biased", [True, False])
def test_one_convolution_with_the_dense_kernel_does_the_same(name, biased):
    chain, x = chain_of(name, biased), random(2, 4, 11, 13, seed=5)
    single = chain.to_conv()
    assert (single.bias is not None) == biased
    torch.testing.assert_close(chain(x), single(x), rtol=0, atol=1e-11)


def test_the_dense_kernel_of_two_steps_is_their_product():
    chain = chain_of("separable")
    first, second = (conv.weight for conv in chain.convolutions)
    wanted = torch.einsum("frh,rcw->fchw", second[..., 0], first[:, :, 0])
    torch.testing.assert_close(chain.dense(), wanted, rtol=0, atol=1e-12)


def test_multiply_adds_are_those_of_the_tensors_that_flow(name):
    chain, x, total = chain_of(name), random(1, 4, 11, 13, seed=5), 0
    for conv in chain.convolutions:
        x = conv(x)
        total += x[0, 0].numel() * conv.weight.numel()
    assert chain.macs(11, 13) == total


def test_macs_of_a_single_convolution_and_of_a_picture_that_is_too_small():
    assert conv_macs(nn.Conv2d(4, 6, 3, groups=2), 5, 7) == (3 * 5 * 6 * 2 * 9, 3, 5)
    with pytest.raises(ValueError, match=r"a 2 x 9 picture is smaller than the kernel \(3, 3\)"):
        conv_macs(nn.Conv2d(4, 6, 3), 2, 9)


def test_spec_goes_through_json_and_the_tensors_through_a_state_dict(name):
    chain = chain_of(name)
    again = ConvChain.from_spec(json.loads(json.dumps(chain.spec())), dtype=torch.float64)
    again.load_state_dict(chain.state_dict())
    x = random(1, 4, 11, 13, seed=5)
    assert torch.equal(again(x), chain(x))
    assert again.spec() == chain.spec()
    assert ConvChain.from_spec(chain.spec(), device="meta").convolutions[0].weight.device.type == "meta"
    stored = sum(p.numel() for p in chain.parameters())
    assert (chain.num_parameters(), chain.nbytes()) == (stored, 8 * stored)


def test_gradients_reach_every_kernel():
    chain = chain_of("four")
    chain(random(1, 4, 11, 13)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in chain.parameters())


def test_what_is_no_single_convolution_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        ConvChain([])
    with pytest.raises(ValueError, match="3 channels go into a convolution of 2"):
        ConvChain([ConvStep(4, 3), ConvStep(2, 3)])
    with pytest.raises(ValueError, match="along the horizontal axis"):
        ConvChain([ConvStep(4, 3, (1, 3)), ConvStep(3, 3, (1, 3))])
    with pytest.raises(ValueError, match="steps and bias"):
        ConvChain.from_spec({"type": "low_rank"})
    with pytest.raises(ValueError, match="wrong entries"):
        ConvChain.from_spec({"type": "conv_chain", "steps": [{"colour": "red"}], "bias": True})
