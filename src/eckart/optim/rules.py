"""Update rules: what is done with a gradient, projected or not, once it is known.

    AdamW       M ← β₁ M + (1-β₁) R,  V ← β₂ V + (1-β₂) R∘R,  N = (M / (1-β₁ᵗ)) / (√(V / (1-β₂ᵗ)) + ε)
    Adafactor   V ≈ rows columnsᵀ / mean(rows), means of R∘R over columns and over rows,  N = M of R / (√V̂ + ε)
    Lion        N = sign(β₁ M + (1-β₁) R),  M ← β₂ M + (1-β₂) R
    SGD         M ← β₁ M + R,  N = M

Decoupled weight decay is the optimizer's. References: Loshchilov and Hutter 2017 (arXiv:1711.05101), Shazeer and Stern
2018 (arXiv:1804.04235), Chen et al. 2023 (arXiv:2302.06675).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .moments import State, allocate, load, store
from .sharding import from_local, local, whole

__all__ = ["Adafactor", "AdamW", "Lion", "Momentum", "Rule", "Rules", "rule"]

Rules = Literal["adamw", "adafactor", "lion", "sgd"]


@dataclass(frozen=True)
class Rule(ABC):
    """An update rule with its numbers.

    Attributes:
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        bits: Of each stored moment of a matrix, 32 or 8.
    """

    betas: tuple[float, float]
    eps: float
    bits: int = 32

    @abstractmethod
    def allocate(self, like: Tensor) -> State:
        """The moments as zeros, for a gradient placed like this one."""

    @abstractmethod
    def direction(self, gradient: Tensor, state: State, number: int) -> Tensor:
        """N, shaped like the gradient; brings the moments in ``state`` up to date.

        Args:
            gradient: R.
            state: As `allocate` gave it.
            number: t, the first is 1.
        """


class AdamW(Rule):
    """Adam, biases corrected as in `torch.optim.AdamW`."""

    def allocate(self, like: Tensor) -> State:
        """First and second moment."""
        return {
            **allocate("first", like, bits=self.bits),
            **allocate("second", like, bits=self.bits, signed=False),
        }

    def direction(self, gradient: Tensor, state: State, number: int) -> Tensor:
        """N of Adam."""
        first, denominator = self.corrected(gradient, state, number)
        return first / denominator

    def corrected(self, gradient: Tensor, state: State, number: int) -> tuple[Tensor, Tensor]:
        """M / (1-β₁ᵗ) and √(V / (1-β₂ᵗ)) + ε; brings the moments up to date."""
        first = load(state, "first", gradient.dtype).lerp_(gradient, 1 - self.betas[0])
        second = load(state, "second", gradient.dtype).mul_(self.betas[1])
        second.addcmul_(gradient, gradient, value=1 - self.betas[1])
        store(state, "first", first)
        store(state, "second", second)
        scale = (1 - self.betas[1] ** number) ** 0.5
        return first / (1 - self.betas[0] ** number), second.sqrt() / scale + self.eps


class Adafactor(Rule):
    """Adam with the second moment factored into a row and a column, for matrices."""

    def allocate(self, like: Tensor) -> State:
        """First moment, and the means of squares over rows and over columns; of a vector, the squares."""
        first = allocate("first", like, bits=self.bits)
        if like.ndim < 2:
            return {**first, **allocate("second", like)}
        own = local(like)
        rows = from_local(own.new_zeros(own.shape[0]), like, shape=like.shape[:1])
        return {**first, "rows": rows, "columns": own.new_zeros(own.shape[1:])}

    def direction(self, gradient: Tensor, state: State, number: int) -> Tensor:
        """N with the factored second moment."""
        squares = gradient.square()
        correction = 1 - self.betas[1] ** number
        if gradient.ndim < 2:
            second = state["second"].lerp_(squares, 1 - self.betas[1]) / correction
        else:
            rows = state["rows"].lerp_(squares.flatten(1).mean(dim=1), 1 - self.betas[1]) / correction
            columns = state["columns"].lerp_(whole(squares.mean(dim=0)), 1 - self.betas[1]) / correction
            mean = whole(rows.mean()).clamp(min=torch.finfo(gradient.dtype).tiny)
            outer = (local(rows) / mean).reshape(-1, *[1] * (gradient.ndim - 1)) * columns
            second = from_local(outer, gradient)
        first = load(state, "first", gradient.dtype).lerp_(gradient, 1 - self.betas[0])
        store(state, "first", first)
        return first / (1 - self.betas[0] ** number) / (second.sqrt() + self.eps)


class Lion(Rule):
    """The sign of an interpolated momentum; every entry moves by the learning rate."""

    def allocate(self, like: Tensor) -> State:
        """First moment."""
        return allocate("first", like, bits=self.bits)

    def direction(self, gradient: Tensor, state: State, number: int) -> Tensor:
        """Signs."""
        return self.interpolated(gradient, state).sign()

    def interpolated(self, gradient: Tensor, state: State) -> Tensor:
        """β₁ M + (1-β₁) R before the sign is taken; brings the moment up to date."""
        first = load(state, "first", gradient.dtype)
        found = torch.lerp(first, gradient, 1 - self.betas[0])
        store(state, "first", first.lerp_(gradient, 1 - self.betas[1]))
        return found


class Momentum(Rule):
    """Gradient descent with momentum β₁ as in `torch.optim.SGD`; 0 for none."""

    def allocate(self, like: Tensor) -> State:
        """First moment, if there is momentum."""
        return allocate("first", like, bits=self.bits) if self.betas[0] > 0 else {}

    def direction(self, gradient: Tensor, state: State, number: int) -> Tensor:
        """Momentum."""
        if self.betas[0] == 0:
            return gradient
        first = load(state, "first", gradient.dtype).mul_(self.betas[0]).add_(gradient)
        store(state, "first", first)
        return first.clone()


def rule(name: Rules, betas: tuple[float, float], eps: float, bits: int = 32) -> Rule:
    """The update rule of a name.

    Example:
        >>> moments = rule("adamw", (0.9, 0.999), 1e-8)
        >>> state = moments.allocate(torch.zeros(2, 3))
        >>> torch.allclose(moments.direction(torch.full((2, 3), 5.0), state, 1), torch.ones(2, 3))
        True
    """
    rules: dict[str, type[Rule]] = {"adamw": AdamW, "adafactor": Adafactor, "lion": Lion, "sgd": Momentum}
    return rules[name](betas, eps, bits)
