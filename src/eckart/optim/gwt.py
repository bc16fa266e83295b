"""GWT: Adam's moments of the averages of neighbouring gradients, and their differences at the same step sizes.

    [A | D_L | ... | D_1] = G Hᵀ (m, n),   N = min(1, γ s / ‖N‖) · M̂ / (√V̂ + ε),   M, V of A (m, n / 2ᴸ)
    D_l ← D_l / (√V̂ + ε),   W ← W - lr · scale · [N | D_L | ... | D_1] H

H (n, n) is an orthonormal wavelet transform. One denominator serves all the differences that its average covers, the
factor of γ scales them too, and s is the norm of N in the step before. The update has full rank; no basis is stored.

Z. Wen, P. Luo, J. Wang, X. Deng, J. Zou, K. Yuan, T. Sun, D. Li, "Breaking Memory Limits: Gradient Wavelet Transform
Enhances LLMs Training", 2025, arXiv:2501.07237. Code: github.com/zqOuO/GWT.

What differs. The official code corrects the bias of the whole update by 1 / (1-β₁ᵗ), ten times too much at first for
differences, which have no momentum, and limits growth before that: ``bias="reference"``. Here only N is corrected.
Where neighbours cancel, an average says nothing about its differences and the quotient explodes; it is cut at ``clip``,
by default about what a step of Adam can reach. A side that is no multiple of 2ᴸ is not padded with zeros: its last
entry joins the averages. The level follows the rank, so that groups made for other methods have states of like size.
After a step without a gradient the limiter starts anew (see `eckart.optim.limiter`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..linalg.transforms import Wavelet, WaveletName
from .contract import OptimizerMethod, Side, Step, turned
from .limiter import check_gamma, growth_factor
from .moments import State
from .optimizer import ProjectedOptimizer
from .rules import AdamW
from .sharding import by_rows, from_local, local, placed_as, whole_norm

__all__ = ["GWT", "GWTAdamW", "GWTAdamW8bit"]

Bias = Literal["coarse", "reference"]


@dataclass(frozen=True)
class GWT(OptimizerMethod):
    """The options of GWT; the rule is AdamW, as the differences are divided by the root of a second moment.

    Args:
        level: L, at which 2ᴸ neighbours share a pair of moments, 2 in the paper; None for the largest at which there
            are at least ``rank`` averages, which is 2 for a rank of a quarter of the side. ``rank`` must be given with
            it too, as None leaves a matrix to the dense rule.
        wavelet: "haar" as in the paper, or "db2" to "db4", with a periodic boundary.
        side: Of the matrix whose entries are neighbours: "right" (along a row) as in the paper, "left", "short" or
            "long". One that FSDP2 shards is exchanged between the processes twice a step, as a whole matrix.
        scale: Multiplies the update; 0.25 in the official code.
        gamma: γ, by which the norm of N may grow in a step; None for no limit.
        clip: Largest size of a difference after division; ours. None for none, as in the paper.
        bias: "coarse" corrects the bias of N, "reference" that of the whole update and after the limiter.
    """

    level: int | None = None
    wavelet: WaveletName = "haar"
    side: Side = "right"
    scale: float = 0.25
    gamma: float | None = 1.01
    clip: float | None = 3.0
    bias: Bias = "coarse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule != "adamw":
            raise ValueError(f"rule must be 'adamw', as differences are divided by its denominator, not {self.rule!r}")
        if self.level is not None and self.level < 0:
            raise ValueError(f"level must be at least 0, or None to follow the rank, not {self.level}")
        check_gamma(self.gamma)
        self.check_positive(scale=self.scale, clip=math.inf if self.clip is None else self.clip)
        self.check_choices(wavelet=WaveletName, side=Side, bias=Bias)

    def moments(self) -> AdamW:
        """The update rule with this method's numbers."""
        return AdamW(self.betas, self.eps, self.bits)

    def transform(self, size: int) -> Wavelet:
        """Hᵀ for a side of this length, with as many levels as the options say; 0 where not even 1 is possible."""
        if self.level is not None:
            return Wavelet(self.wavelet, self.level)
        assert self.rank is not None
        level = 0
        while size > 1 and -(-size // 2) >= self.rank:
            size, level = -(-size // 2), level + 1
        return Wavelet(self.wavelet, level)

    def fits(self, shape: Sequence[int]) -> bool:
        """A matrix with a side long enough for ``level``, or for one level with ``rank`` averages."""
        if len(shape) != 2 or self.rank is None:
            return False
        size = turned(torch.empty(tuple(shape), device="meta"), self.side).shape[1]
        if self.level is None:
            return self.transform(size).levels != 0
        return self.level <= max(size - 1, 0).bit_length()

    def allocate(self, like: Tensor) -> State:
        """Moments of the averages, and the norm of N."""
        rows = by_rows(turned(like, self.side))
        own, width = local(rows), self.transform(rows.shape[1]).sizes(rows.shape[1])[0]
        coarse = from_local(own.new_zeros(own.shape[0], width), rows, shape=(rows.shape[0], width))
        return {**self.moments().allocate(coarse), "norm": own.new_zeros(())}

    def direction(self, gradient: Tensor, state: State, step: Step, weight: Tensor) -> Tensor:
        """Transforms rows, applies Adam to the averages and its denominators to the differences, transforms back."""
        a = turned(gradient, self.side)
        rows = by_rows(a)
        transform = self.transform(rows.shape[1])
        y = transform(local(rows))
        average, *details = transform.bands(y)
        coarse = from_local(average, rows, shape=(rows.shape[0], average.shape[1]))
        first, denominator = self.moments().corrected(coarse, state, step.number)
        n = first / denominator
        average.copy_(local(n))
        # In the official code the step size corrects the bias, of everything and after N has been limited.
        late = [1 - beta**step.number if self.bias == "reference" else 1.0 for beta in self.betas]
        for place, detail in enumerate(details):
            divide_blocks(detail, local(denominator) * late[0], 2**place)
            if self.clip is not None:
                detail.clamp_(-self.clip, self.clip)
        if self.gamma is not None:
            size = whole_norm(n) * (late[0] / late[1] ** 0.5)
            y.mul_(growth_factor(size, state["norm"], self.gamma, usual=n.numel() ** 0.5))
        update = placed_as(from_local(transform.adjoint(y.mul_(self.scale)), rows), a)
        return update if a is gradient else update.mT


def divide_blocks(x: Tensor, by: Tensor, block: int) -> None:
    """Divide x[..., i] by by[..., i // block], in place; the last block may be cut short.

    Args:
        x: (..., n).
        by: (..., at least n / block, rounded up).
        block: Neighbours that share a divisor.

    Example:
        >>> x = torch.tensor([2.0, 4.0, 6.0])
        >>> divide_blocks(x, torch.tensor([2.0, 3.0]), 2)
        >>> x.tolist()
        [1.0, 2.0, 2.0]
    """
    full = x.shape[-1] // block
    x[..., : full * block].unflatten(-1, (full, block)).div_(by[..., :full, None])
    x[..., full * block :].div_(by[..., full : full + 1])


class GWTAdamW(ProjectedOptimizer):
    """AdamW on averages of neighbouring gradients, with their differences. Options as `GWT` and `ProjectedOptimizer`.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(6, 8))
        >>> optimizer = GWTAdamW([weight], lr=0.1, rank=2)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> {name: tuple(value.shape) for name, value in optimizer.state[weight].items()}
        {'step': (), 'first': (6, 2), 'second': (6, 2), 'norm': ()}
    """

    method: ClassVar[type[GWT]] = GWT
    options: ClassVar[dict[str, Any]] = {}


class GWTAdamW8bit(GWTAdamW):
    """`GWTAdamW` with moments of eight bits."""

    options: ClassVar[dict[str, Any]] = {"bits": 8}
