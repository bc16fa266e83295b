"""A convolution as a row of smaller ones: one kernel (out, in, kh, kw) factored over channels and over both axes.

    y = conv_t(... conv_2(conv_1(x))) + b,   two to four plain convolutions, a bias after the last

Not a `Structure`: that is a linear map of rows, and a convolution's cost depends on the size of the picture. The
interface is the same otherwise: ``spec``, ``from_spec``, ``dense``, ``num_parameters``, and ``macs`` for a size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from .base import empty_parameter, wide

__all__ = ["ConvChain", "ConvStep", "conv_macs"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class ConvStep:
    """The shape of one plain convolution, with the arguments of ``nn.Conv2d``.

    Attributes:
        in_channels: C.
        out_channels: F.
        kernel_size: (kh, kw).
        stride: (vertical, horizontal).
        padding: zeros on each side, or "same" or "valid".
        dilation: (vertical, horizontal).
        groups: g, which divides C and F; the weight is (F, C / g, kh, kw).
    """

    in_channels: int
    out_channels: int
    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair | Literal["same", "valid"] = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """The step of its fields, where JSON has made lists of the pairs."""
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items()}
        return cls(**given)

    def works_on(self, axis: int) -> bool:
        """Whether it does anything along the axis (0 vertical, 1 horizontal) but pass it on."""
        padded = self.kernel_size[axis] > 1 if isinstance(self.padding, str) else self.padding[axis] > 0
        return self.kernel_size[axis] > 1 or self.stride[axis] > 1 or padded


def conv_macs(step: ConvStep | nn.Conv2d, height: int, width: int) -> tuple[int, int, int]:
    """Multiply-adds of a convolution on one picture, and the size of what comes out.

        macs = H' W' F (C / g) kh kw

    Args:
        step: the convolution.
        height: H of the picture that enters, in pixels.
        width: W of it.

    Returns:
        macs, H', W'.

    Raises:
        ValueError: the picture is smaller than the kernel.

    Example:
        >>> conv_macs(nn.Conv2d(4, 8, 3, stride=2, padding=1), 9, 9)
        (7200, 5, 5)
    """
    sizes = []
    for axis, size in enumerate((height, width)):
        kernel, stride, dilation = step.kernel_size[axis], step.stride[axis], step.dilation[axis]
        span = dilation * (kernel - 1)
        padding = step.padding[axis] * 2 if not isinstance(step.padding, str) else span * (step.padding == "same")
        sizes.append((size + int(padding) - span - 1) // stride + 1)
    if min(sizes) < 1:
        raise ValueError(f"a {height} x {width} picture is smaller than the kernel {tuple(step.kernel_size)}")
    per_pixel = step.out_channels * (step.in_channels // step.groups) * math.prod(step.kernel_size)
    return sizes[0] * sizes[1] * per_pixel, sizes[0], sizes[1]


class ConvChain(nn.Module):
    """Plain convolutions one after the other in the place of a single one.

    Args:
        steps: their shapes, first to last. Along each axis one of them at most may have a kernel, stride or padding:
            then the chain is again one convolution, `dense`.
        bias: whether the last one has a bias (out,); the others have none.
        device: device of the parameters; "meta" allocates nothing.
        dtype: dtype of the parameters.

    Attributes:
        convolutions: the ``nn.Conv2d`` modules, uninitialised until `from_kernels` or ``load_state_dict``.

    Raises:
        ValueError: no steps, channels that do not fit, or two steps that work on one axis.

    Example:
        >>> chain = ConvChain([ConvStep(4, 2, (1, 3), padding=(0, 1)), ConvStep(2, 8, (3, 1), padding=(1, 0))])
        >>> chain.num_parameters(), chain.macs(10, 10), tuple(chain.dense().shape)
        (72, 7200, (8, 4, 3, 3))
    """

    type_name: ClassVar[str] = "conv_chain"

    def __init__(
        self,
        steps: Sequence[ConvStep],
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(steps)
        self.steps = tuple(steps)
        convolutions = []
        for index, step in enumerate(steps):
            # On the meta device nothing is drawn; the empty parameters come after.
            convolution = nn.Conv2d(**asdict(step), bias=bias and index == len(steps) - 1, device="meta", dtype=dtype)
            for name, parameter in list(convolution.named_parameters()):
                empty = empty_parameter(*parameter.shape, device=device, dtype=dtype)
                convolution.register_parameter(name, empty)
            convolutions.append(convolution)
        self.convolutions = nn.ModuleList(convolutions)

    @classmethod
    def from_kernels(cls, steps: Sequence[ConvStep], kernels: Sequence[Tensor], *, bias: Tensor | None = None) -> Self:
        """The chain with these weights (F, C / g, kh, kw), and a bias (out,) after the last; copied."""
        chain = cls(steps, bias=bias is not None, device=kernels[0].device, dtype=kernels[0].dtype)
        with torch.no_grad():
            for convolution, kernel in zip(chain.convolutions, kernels, strict=True):
                convolution.get_parameter("weight").copy_(kernel)
            if bias is not None:
                chain.convolutions[-1].get_parameter("bias").copy_(bias)
        return chain

    @property
    def in_channels(self) -> int:
        """Channels of the first convolution's input."""
        return self.steps[0].in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the last one's output."""
        return self.steps[-1].out_channels

    @property
    def bias(self) -> Tensor | None:
        """Bias of the last convolution (out,), or None."""
        found = self.convolutions[-1].bias
        assert found is None or isinstance(found, Tensor)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H', W'), one convolution after the other."""
        for convolution in self.convolutions:
            x = convolution(x)
        return x

    def dense(self) -> Tensor:
        """The kernel (out, in, kh, kw) of the one convolution that does the same; differentiable."""
        # What a chain answers to a single bright pixel is its kernel upside down.
        first = self.convolutions[0].get_parameter("weight")
        x = torch.eye(self.in_channels, dtype=wide(first).dtype, device=first.device)[:, :, None, None]
        for step, convolution in zip(self.steps, self.convolutions, strict=True):
            full = [size - 1 for size in step.kernel_size]
            x = nn.functional.conv2d(x, wide(convolution.get_parameter("weight")), padding=full, groups=step.groups)
        return x.transpose(0, 1).flip(-1, -2).to(first.dtype)

    def to_conv(self) -> nn.Conv2d:
        """One ``nn.Conv2d`` that computes the same, with its weights in the chain's dtype."""
        kernel, bias = self.dense().detach(), self.bias
        word = next((step.padding for step in self.steps if isinstance(step.padding, str)), None)
        numbers = [step.padding for step in self.steps if not isinstance(step.padding, str)]
        padding: Any = word or tuple(sum(pair[axis] for pair in numbers) for axis in (0, 1))
        stride, dilation = (
            tuple(math.prod(getattr(step, name)[axis] for step in self.steps) for axis in (0, 1))
            for name in ("stride", "dilation")
        )
        made = nn.Conv2d(
            self.in_channels, self.out_channels, (kernel.shape[2], kernel.shape[3]), (stride[0], stride[1]), padding,
            (dilation[0], dilation[1]), bias=bias is not None, device=kernel.device, dtype=kernel.dtype,
        )  # fmt: skip
        with torch.no_grad():
            made.weight.copy_(kernel)
            if made.bias is not None and bias is not None:
                made.bias.copy_(bias)
        return made

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds on one picture of that size; an early convolution runs on the map before a later stride."""
        total = 0
        for step in self.steps:
            macs, height, width = conv_macs(step, height, width)
            total += macs
        return total

    def num_parameters(self) -> int:
        """Stored numbers, bias included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())

    def spec(self) -> dict[str, Any]:
        """What is needed to build the same module without its values, as plain JSON data."""
        steps = [
            {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(step).items()}
            for step in self.steps
        ]
        return {"type": self.type_name, "steps": steps, "bias": self.bias is not None}

    @classmethod
    def from_spec(
        cls, spec: Mapping[str, Any], *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Build the module of a spec, possibly through JSON; values uninitialised.

        Raises:
            ValueError: the spec is of another type, or lacks or adds an entry.
        """
        if spec.get("type") != cls.type_name or spec.keys() != {"type", "steps", "bias"}:
            raise ValueError(f"a spec of type {cls.type_name!r} has steps and bias, got {dict(spec)}")
        try:
            steps = [ConvStep.from_json(step) for step in spec["steps"]]
        except TypeError as error:
            raise ValueError(f"spec of a {cls.type_name!r} has wrong entries: {error}") from error
        return cls(steps, bias=spec["bias"], device=device, dtype=dtype)


def _check(steps: Sequence[ConvStep]) -> None:
    if not steps:
        raise ValueError("a chain needs at least one convolution")
    for one, other in pairwise(steps):
        if one.out_channels != other.in_channels:
            raise ValueError(f"{one.out_channels} channels go into a convolution of {other.in_channels}")
    for axis, name in enumerate(("vertical", "horizontal")):
        if sum(step.works_on(axis) for step in steps) > 1:
            raise ValueError(f"two convolutions of a chain have a kernel, stride or padding along the {name} axis")
