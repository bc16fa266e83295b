"""The verb: give a network the weights of a published initialisation, from data, before its first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..models.chain import Perceptron, perceptron
from ..options import chosen_method
from .contract import Affine, Initialization, InitializationMethod
from .moments import joint_moments

__all__ = ["initialize"]

_NO_BIAS = 1e-6  # a bias that is smaller than this, against what it is added to, may be missing


@torch.no_grad()
def initialize(
    network: nn.Module,
    method: str | InitializationMethod,
    inputs: Tensor | Iterable[tuple[Tensor, Tensor]],
    targets: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Initialization:
    """Sets weights and biases of an `nn.Sequential` of linear layers and elementwise activations, in place.

    Args:
        network: See `eckart.models.chain.perceptron`; dtype and device stay.
        method: A catalog name (`eckart methods --family pretraining`), or a method with its options.
        inputs: (N, p), or as the network takes them if it begins with `nn.Flatten`; or pairs of inputs and targets,
            read once, of which only moments are kept.
        targets: (N, q), if not in the pairs.
        generator: On the CPU; None means a private one with a fixed seed, so that every call gives the same.
        options: Of the method, when it is given by name.

    Returns:
        What the network starts from.

    Raises:
        UnknownMethodError: With the nearest names.
        ValueError: A network, data or an option that does not fit. The network is as it was then.

    Example:
        >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> network = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 4))
        >>> found = initialize(network, "svd-init", x, x)  # an autoencoder starts as its PCA
        >>> found.rank, round(found.explained, 2)
        (2, 0.62)
    """
    chosen = chosen_method(method, options, "pretraining")
    if not isinstance(chosen, InitializationMethod):
        raise ValueError(f"{method} is no initialisation; `eckart methods {method}` says what it is")
    parts = perceptron(network)
    widths = [parts.linears[0].in_features, *(linear.out_features for linear in parts.linears)]
    for name, linear, width in zip(parts.names, parts.linears, widths, strict=False):
        if linear.in_features != width:
            raise ValueError(f"layer {name!r} takes {linear.in_features} inputs, and {width} come to it")
    moments = joint_moments(_pairs(parts, inputs, targets))
    if moments.xy.shape != (widths[0], widths[-1]):
        raise ValueError(
            f"the data has rows of {moments.xy.shape[0]} inputs and {moments.xy.shape[1]} targets, the network takes "
            f"{widths[0]} and gives {widths[-1]}"
        )
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    found = chosen.initialize(widths, parts.activations, moments, generator)
    spread = (moments.yy / moments.count) ** 0.5
    for index, (name, linear, affine) in enumerate(zip(parts.names, parts.linears, found.layers, strict=True)):
        _check(name, linear, affine, spread if index == len(parts.linears) - 1 else 1.0)
    for linear, affine in zip(parts.linears, found.layers, strict=True):
        linear.weight.copy_(affine.weight)
        if linear.bias is not None:
            linear.bias.copy_(affine.bias)
    return found


def _pairs(
    parts: Perceptron, inputs: Tensor | Iterable[tuple[Tensor, Tensor]], targets: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(inputs, Tensor) != isinstance(targets, Tensor):
        raise ValueError("give inputs and targets as two tensors, or pairs of them alone")
    given = [(inputs, targets)] if isinstance(inputs, Tensor) and isinstance(targets, Tensor) else inputs
    for x, y in given:
        yield parts.rows(x), y


def _check(name: str, linear: nn.Linear, affine: Affine, scale: float) -> None:
    largest = torch.finfo(linear.weight.dtype).max
    for tensor in affine:
        if not bool((tensor.abs() <= largest).all()):
            raise ValueError(f"layer {name!r} would have weights beyond {linear.weight.dtype}; scale the data")
    bias: Tensor | None = linear.bias
    if bias is None and float(affine.bias.abs().max()) > _NO_BIAS * scale:
        raise ValueError(f"layer {name!r} has no bias, which means and activation need; give it one")
