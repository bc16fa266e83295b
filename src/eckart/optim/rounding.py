"""Writing an updated weight back without losing small updates.

    bfloat16:  x ↑ or ↓ to a neighbour, with the probability that makes the mean x

Rounding to nearest leaves a bfloat16 weight where it is while its update is below a 256th of it, and a weight of eight
bits while it is below a 254th of the largest in its row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["dense", "round_stochastically", "write_back"]


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """x in bfloat16, rounded at random so that its mean is x.

    Args:
        x: float32, any shape.
        generator: Source of randomness, on x's device.

    Example:
        >>> x = torch.full((10_000,), 1 + 2**-9)  # a quarter of the way from 1 to the next bfloat16
        >>> mean = round_stochastically(x, torch.Generator().manual_seed(0)).float().mean()
        >>> abs(float(mean) - float(x[0])) < 1e-4
        True
    """
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    bits = (x.contiguous().view(torch.int32) + noise) & -65536
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)


def dense(parameter: Tensor) -> Tensor:
    """A parameter as a plain tensor: itself, or what a tensor that stores its numbers in fewer bits stands for.

    Args:
        parameter: What this process holds of it.
    """
    if not _is_packed(parameter):
        return parameter
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32)).dequantize()


def write_back(parameter: Tensor, value: Tensor, generator: torch.Generator, *, at_random: bool = False) -> None:
    """Set a parameter in place, to nearest, or at random.

    A tensor that stores its numbers in fewer bits, such as torchao's INT8 weight for training, is always set at random:
    it rounds so itself when it is copied to, in a bfloat16 one on the way there too. What it draws from the source that
    all share is drawn from ``generator`` instead.

    Args:
        parameter: What this process holds of it.
        value: In the dtype of the arithmetic.
        generator: On the parameter's device.
        at_random: Whether a bfloat16 parameter is rounded at random.
    """
    packed = _is_packed(parameter)
    if (at_random or packed) and parameter.dtype == torch.bfloat16:
        value = round_stochastically(value.to(torch.float32), generator)
    with _drawing_from(generator) if packed else contextlib.nullcontext():
        parameter.copy_(value)


def _is_packed(parameter: Tensor) -> bool:
    return bool(is_traceable_wrapper_subclass(parameter))


@contextlib.contextmanager
def _drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Whoever draws without a generator draws from this one, and leaves the shared source as it was."""
    device = generator.device
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        if device.type == "cpu":
            torch.set_rng_state(generator.get_state())
        else:
            torch.get_device_module(device).set_rng_state(generator.get_state(), device)
        yield
