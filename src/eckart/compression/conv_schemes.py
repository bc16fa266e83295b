"""How one convolution becomes a row of smaller ones: three foldings of its kernel into matrices, and CP.

Kernel T (F, C, kh, kw), rank R; stride and padding stay with the convolution that has the kernel of that axis.

    separable             (F kh) x (C kw) matrix        1 x kw: C -> R,  kh x 1: R -> F        R (F kh + C kw)
    grouped-pointwise(g)  g of F x (C/g kh kw)          kh x kw in g groups: C -> g R,  1 x 1: g R -> F
                                                                                             g R (F + C/g kh kw)
    pointwise-grouped(g)  g of C x (F/g kh kw)          1 x 1: C -> g R,  kh x kw in g groups: g R -> F
                                                                                             g R (C + F/g kh kw)
    cp                    sum_r a_r b_r c_r d_r         1 x 1: C -> R,  kh x 1 and 1 x kw depthwise,  1 x 1: R -> F
                                                                                             R (F + C + kh + kw)

The foldings are those of Mixed-TD (arXiv:2306.05021): g = 1 is "k x k then 1 x 1" or its mirror image, g = C and
g = F are depthwise convolutions. For the foldings the truncated SVD is the best of its rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..linalg import cp, svd
from ..structures.conv_chain import ConvChain, ConvStep

__all__ = ["Kind", "Scheme", "factored", "kernels_of", "max_rank", "schemes", "steps_of", "why_not"]

Kind = Literal["separable", "grouped-pointwise", "pointwise-grouped", "cp"]

_CP_STARTS = 2  # alternating least squares may end in a poor place; a second start is random
_CP_SWEEPS = 200
_CP_TOL = 1e-4  # of the error, a sweep: beyond that a trained kernel gains nothing


@dataclass(frozen=True)
class Scheme:
    """A way to factor a kernel.

    Attributes:
        kind: see the module.
        groups: g, of the convolution that has the kernel.
    """

    kind: Kind
    groups: int = 1

    def __str__(self) -> str:
        return self.kind if self.groups == 1 else f"{self.kind}({self.groups})"


def why_not(convolution: nn.Conv2d) -> str | None:
    """Why a convolution cannot be factored, or None.

    Example:
        >>> why_not(nn.Conv2d(4, 8, 1)), why_not(nn.Conv2d(4, 8, 3)) is None
        ('1 x 1: it is a matrix already', True)
    """
    if type(convolution).forward is not nn.Conv2d.forward:
        return f"{type(convolution).__name__} computes more than a convolution"
    if math.prod(convolution.kernel_size) == 1:
        return "1 x 1: it is a matrix already"
    if convolution.groups != 1:
        return "it is grouped already"
    if convolution.padding_mode != "zeros":
        return f"its padding is {convolution.padding_mode!r}, not zeros"
    return None


def schemes(
    convolution: nn.Conv2d, kinds: Sequence[Kind] = get_args(Kind), groups: Sequence[int] | None = None
) -> list[Scheme]:
    """The schemes that fit a convolution.

    Args:
        convolution: plain, of C to F channels.
        kinds: which kinds to take.
        groups: which numbers of groups to take, those that divide C or F; None for every divisor.

    Example:
        >>> [str(scheme) for scheme in schemes(nn.Conv2d(2, 3, 3))]  # doctest: +ELLIPSIS
        ['separable', 'grouped-pointwise', 'grouped-pointwise(2)', 'pointwise-grouped', 'pointwise-grouped(3)', 'cp']
    """
    found = []
    for kind in kinds:
        channels = {"grouped-pointwise": convolution.in_channels, "pointwise-grouped": convolution.out_channels}
        size = channels.get(kind, 1)
        found += [Scheme(kind, g) for g in range(1, size + 1) if size % g == 0 and (groups is None or g in groups)]
    return found


def max_rank(convolution: nn.Conv2d, scheme: Scheme) -> int:
    """The rank from which a scheme holds every kernel of this size."""
    f, c, (kh, kw), g = convolution.out_channels, convolution.in_channels, convolution.kernel_size, scheme.groups
    sizes = {
        "separable": (f * kh, c * kw),
        "grouped-pointwise": (f, c // g * kh * kw),
        "pointwise-grouped": (c, f // g * kh * kw),
    }
    if scheme.kind == "cp":
        return f * c * kh * kw // max(f, c, kh, kw)
    return min(sizes[scheme.kind])


def steps_of(convolution: nn.Conv2d, scheme: Scheme, rank: int) -> list[ConvStep]:
    """The shapes of the convolutions of a scheme."""
    f, c, (kh, kw), g = convolution.out_channels, convolution.in_channels, convolution.kernel_size, scheme.groups
    padding = convolution.padding
    stride, dilation = convolution.stride, convolution.dilation

    def along(axis: int, inputs: int, outputs: int, groups: int = 1) -> ConvStep:
        def only(pair: tuple[int, ...], rest: int) -> tuple[int, int]:
            return (pair[0], rest) if axis == 0 else (rest, pair[1])

        pad = padding if isinstance(padding, str) else only(padding, 0)
        return ConvStep(inputs, outputs, only((kh, kw), 1), only(stride, 1), pad, only(dilation, 1), groups)  # type: ignore[arg-type]

    def whole(inputs: int, outputs: int) -> ConvStep:
        return ConvStep(inputs, outputs, (kh, kw), stride, padding, dilation, g)  # type: ignore[arg-type]

    if scheme.kind == "separable":
        return [along(1, c, rank), along(0, rank, f)]
    if scheme.kind == "grouped-pointwise":
        return [whole(c, g * rank), ConvStep(g * rank, f)]
    if scheme.kind == "pointwise-grouped":
        return [ConvStep(c, g * rank), whole(g * rank, f)]
    return [ConvStep(c, rank), along(0, rank, rank, rank), along(1, rank, rank, rank), ConvStep(rank, f)]


def kernels_of(weight: Tensor, scheme: Scheme, rank: int) -> list[Tensor]:
    """The kernels of a scheme's convolutions, the singular values shared evenly by them.

    Args:
        weight: T (F, C, kh, kw).
        scheme: how.
        rank: R, at most `max_rank` for the foldings.

    Returns:
        As many kernels as `steps_of` has steps, in float64 for a float64 weight and float32 otherwise.
    """
    f, c, kh, kw = weight.shape
    g = scheme.groups
    if scheme.kind == "cp":
        weights, (a, b, vertical, horizontal), _ = cp(
            weight, rank, starts=_CP_STARTS, max_sweeps=_CP_SWEEPS, tol=_CP_TOL
        )
        share = weights**0.25
        return [
            (b * share).mT[:, :, None, None],
            (vertical * share).mT[:, None, :, None],
            (horizontal * share).mT[:, None, None, :],
            (a * share)[:, :, None, None],
        ]
    if scheme.kind == "separable":
        u, vh = _halves(weight.permute(0, 2, 1, 3).reshape(f * kh, c * kw), rank)
        return [vh.reshape(rank, c, 1, kw), u.reshape(f, kh, rank).permute(0, 2, 1)[..., None]]
    if scheme.kind == "grouped-pointwise":
        folded = weight.reshape(f, g, c // g, kh, kw).transpose(0, 1).reshape(g, f, -1)
        u, vh = _halves(folded, rank)
        return [vh.reshape(g * rank, c // g, kh, kw), u.transpose(0, 1).reshape(f, g * rank, 1, 1)]
    folded = weight.reshape(g, f // g, c, kh, kw).transpose(1, 2).reshape(g, c, -1)
    u, vh = _halves(folded, rank)
    last = vh.reshape(g, rank, f // g, kh, kw).transpose(1, 2).reshape(f, rank, kh, kw)
    return [u.mT.reshape(g * rank, c, 1, 1), last]


def factored(convolution: nn.Conv2d, scheme: Scheme, rank: int) -> ConvChain:
    """The chain of a scheme that is nearest to a convolution's kernel, with its bias, dtype and training mode.

    Args:
        convolution: plain; see `why_not`.
        scheme: how.
        rank: R, from 1 to `max_rank`.

    Raises:
        ValueError: the rank is out of range.
    """
    limit = max_rank(convolution, scheme)
    if not 1 <= rank <= limit:
        raise ValueError(f"the rank of {scheme} must be from 1 to {limit} for this convolution, not {rank}")
    weight = convolution.weight.detach()
    kernels = [kernel.to(weight.dtype) for kernel in kernels_of(weight, scheme, rank)]
    bias = None if convolution.bias is None else convolution.bias.detach()
    chain = ConvChain.from_kernels(steps_of(convolution, scheme, rank), kernels, bias=bias)
    return chain.requires_grad_(convolution.weight.requires_grad).train(convolution.training)


def _halves(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """u sqrt(s) and sqrt(s) vh of the best matrices of that rank; (..., m, n), one or a batch."""
    # An exact driver: `auto` may leave 1 % of the error to chance, more than neighbouring candidates differ.
    best = svd(matrix, rank, driver="exact" if matrix.dtype == torch.float64 else "gram")
    root = best.s.sqrt()
    return best.u * root[..., None, :], root[..., None] * best.vh
