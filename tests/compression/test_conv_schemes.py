from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.compression.conv_schemes import Scheme, factored, kernels_of, max_rank, schemes, steps_of, why_not

# Odd and even kernels, strides, padding, dilation, unequal axes; all with 4 -> 6 channels.
SHAPES = {
    "3 x 3": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "padding": 1, "stride": 2},
    "no padding": {"kernel_size": 3, "stride": (1, 2)},
    "5 x 3": {"kernel_size": (5, 3), "padding": (2, 0), "stride": (3, 1)},
    "2 x 4": {"kernel_size": (2, 4), "padding": (0, 3)},
    "1 x 7": {"kernel_size": (1, 7), "padding": (0, 3), "stride": (2, 1)},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "same": {"kernel_size": (3, 5), "padding": "same"},
    "no bias": {"kernel_size": 3, "bias": False},
}
FOLDINGS = [scheme for scheme in schemes(nn.Conv2d(4, 6, 3)) if scheme.kind != "cp"]


def conv_of(**options) -> nn.Conv2d:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Conv2d(4, 6, **options).double()


def picture(channels: int = 4) -> torch.Tensor:
    return torch.randn(2, channels, 11, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def folded(weight: np.ndarray, scheme: Scheme) -> list[np.ndarray]:
    """The matrices of a folding, gathered entry by entry from its definition."""
    f, c, kh, kw = weight.shape
    g = scheme.groups
    if scheme.kind == "separable":
        return [np.array([[weight[i, j, a, b] for j in range(c) for b in range(kw)]
                          for i in range(f) for a in range(kh)])]  # fmt: skip
    pixels = [(a, b) for a in range(kh) for b in range(kw)]
    if scheme.kind == "grouped-pointwise":
        return [np.array([[weight[i, j, a, b] for j in range(s * c // g, (s + 1) * c // g) for a, b in pixels]
                          for i in range(f)]) for s in range(g)]  # fmt: skip
    return [np.array([[weight[i, j, a, b] for i in range(s * f // g, (s + 1) * f // g) for a, b in pixels]
                      for j in range(c)]) for s in range(g)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", FOLDINGS, ids=str)
def test_a_folding_of_the_largest_rank_is_the_convolution(shape, scheme):
    conv = conv_of(**SHAPES[shape])
    chain = factored(conv, scheme, max_rank(conv, scheme))
    torch.testing.assert_close(chain(picture()), conv(picture()), rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_cp_of_enough_terms_is_the_convolution(shape):
    """A kernel of few terms, so that alternating least squares can find it exactly."""
    conv = conv_of(**SHAPES[shape])
    generator = torch.Generator().manual_seed(2)
    a, b, c, d = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in conv.weight.shape)
    conv.weight.data = torch.einsum("ir,jr,kr,lr->ijkl", a, b, c, d)
    chain = factored(conv, Scheme("cp"), 2)
    torch.testing.assert_close(chain(picture()), conv(picture()), rtol=0, atol=1e-4)


def test_cp_of_one_term_is_exact_on_a_kernel_of_one():
    conv = conv_of(kernel_size=3)
    parts = (torch.arange(1.0, n + 1, dtype=torch.float64) for n in conv.weight.shape)
    conv.weight.data = torch.einsum("i,j,k,l->ijkl", *parts)
    torch.testing.assert_close(factored(conv, Scheme("cp"), 1).dense(), conv.weight.data, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", [(3, 3), (5, 2)])
@pytest.mark.parametrize("scheme", FOLDINGS, ids=str)
def test_the_error_is_the_tail_of_the_folded_matrices_together(scheme, kernel):
    conv = conv_of(kernel_size=kernel)
    weight = conv.weight.detach()
    spectra = [np.linalg.svd(matrix, compute_uv=False) for matrix in folded(weight.numpy(), scheme)]
    for rank in range(1, max_rank(conv, scheme)):
        with torch.no_grad():
            lost = float((weight - factored(conv, scheme, rank).dense()).norm())
        assert lost == pytest.approx(np.sqrt(sum((s[rank:] ** 2).sum() for s in spectra)), rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("scheme", schemes(nn.Conv2d(4, 6, 3)), ids=str)
def test_numbers_and_multiply_adds_are_those_of_the_formulas(scheme):
    conv, rank, g = conv_of(kernel_size=3, padding=1, stride=2), 2, scheme.groups
    f, c, k = 6, 4, 3
    per_rank = {
        "separable": f * k + c * k,
        "grouped-pointwise": g * (f + c // g * k * k),
        "pointwise-grouped": g * (c + f // g * k * k),
        "cp": f + c + k + k,
    }
    chain = factored(conv, scheme, rank)
    assert chain.num_parameters() == rank * per_rank[scheme.kind] + f
    # 11 x 13 comes out as 6 x 7; what runs before a stride runs on the larger map.
    macs = {
        "separable": 11 * 7 * c * k + 6 * 7 * f * k,
        "grouped-pointwise": 6 * 7 * g * (f + c // g * k * k),
        "pointwise-grouped": 11 * 13 * g * c + 6 * 7 * f * k * k,
        "cp": 11 * 13 * c + 6 * 13 * k + 6 * 7 * k + 6 * 7 * f,
    }
    assert chain.macs(11, 13) == rank * macs[scheme.kind]


def test_named_special_cases():
    conv = conv_of(kernel_size=3)
    shapes = {str(s): [(step.kernel_size, step.groups) for step in steps_of(conv, s, 2)] for s in schemes(conv)}
    assert shapes["grouped-pointwise"] == [((3, 3), 1), ((1, 1), 1)]
    assert shapes["grouped-pointwise(4)"] == [((3, 3), 4), ((1, 1), 1)]  # depthwise, then pointwise
    assert shapes["pointwise-grouped(6)"] == [((1, 1), 1), ((3, 3), 6)]  # pointwise, then depthwise
    assert shapes["cp"] == [((1, 1), 1), ((3, 1), 2), ((1, 3), 2), ((1, 1), 1)]
    assert [s.groups for s in schemes(conv, ("grouped-pointwise",), groups=(2, 3))] == [2]


def test_kernels_share_the_singular_values_evenly():
    weight = conv_of(kernel_size=3).weight.detach()
    first, second = kernels_of(weight, Scheme("separable"), 3)
    torch.testing.assert_close(first.flatten(1).norm(dim=1), second.transpose(0, 1).flatten(1).norm(dim=1))


def test_dtype_mode_and_what_is_trained_are_kept():
    conv = conv_of(kernel_size=3).to(torch.bfloat16).eval().requires_grad_(False)
    chain = factored(conv, Scheme("separable"), 12)
    assert {p.dtype for p in chain.parameters()} == {torch.bfloat16}
    assert not chain.training
    assert not any(p.requires_grad for p in chain.parameters())
    torch.testing.assert_close(chain.dense(), conv.weight, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, 1), "1 x 1"),
        (nn.Conv2d(4, 4, 3, groups=2), "grouped already"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "'reflect', not zeros"),
        (type("Scaled", (nn.Conv2d,), {"forward": lambda self, x: 2 * x})(4, 4, 3), "computes more"),
    ],
)
def test_what_is_left_alone(conv, reason):
    found = why_not(conv)
    assert reason in found


def test_ranks_out_of_range_are_refused():
    with pytest.raises(ValueError, match="rank of separable must be from 1 to 12 for this convolution, not 13"):
        factored(conv_of(kernel_size=3), Scheme("separable"), 13)
